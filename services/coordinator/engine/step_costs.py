"""What a step costs on each stage, learnt from results, and how to cut work by it.

A stage's step of n tokens takes about `fixed + per_token * n` seconds: reading the weights, and computing. Chunks of
prompts follow that (chunk_costs.py). Steps of few tokens do not: two rows may cost half as much again as one, and eight
the same as two, as other kernels compute them. So decode costs are also kept by number of tokens, and cuts are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from noodle.wire.messages import StageTiming
from services.coordinator.engine.chunk_costs import ChunkCosts, chunk_shares
from services.coordinator.engine.sequence import PlanLimits

PRIOR_DECODE_SHARE = 0.2  # cost of one more token in a step, as a share of a step of one, before it is measured
PRIOR_TOKENS = (1, 16)  # the two assumed steps
PRIOR_WEIGHT = 0.5  # of each of them; a measured step has 1
FADE = 1 - 1 / 50  # weight of a step against the next one
SMALLEST_CHUNK_TOKENS = 32  # a smaller chunk costs nearly as much, as weights are read for each
MEAN_WEIGHT = 0.1  # of the newest step in the mean of steps with as many tokens
KNOWN_ENDS = 256  # prompts whose cuts are remembered
KNOWN_STEPS = 3  # steps from which on a mean is better than the line
TRIAL_STEPS = 8  # decode steps for which another cut is tried
TRIAL_INTERVAL_STEPS = 256  # between two trials
WORTH_CHANGING = 0.97  # another cut must promise this share of the seconds
DECODE_GAP_SECONDS = 0.25  # how much later a running stream's next token may be for chunks of another's prompt


class LineFit:
    """A line of seconds over tokens by least squares, with newer measurements weighing more."""

    def __init__(self, at_zero: float, per_token: float) -> None:
        """Begin as the line of `at_zero` seconds and `per_token` more for each token."""
        self._sums = [0.0] * 5  # weight, tokens, seconds, tokens squared, tokens times seconds
        for tokens in PRIOR_TOKENS:
            self._put(tokens, at_zero + per_token * tokens, PRIOR_WEIGHT)

    def add(self, tokens: float, seconds: float) -> None:
        self._sums = [total * FADE for total in self._sums]
        self._put(tokens, seconds, 1.0)

    def seconds(self, tokens: float) -> float:
        """Predict the seconds of a step; neither part of the line is below 0."""
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        slope = 0.0 if spread <= 0 else max(0.0, (weight * xy - x * y) / spread)
        slope = min(slope, y / x)
        return y / weight + slope * (tokens - x / weight)

    def _put(self, tokens: float, seconds: float, weight: float) -> None:
        for place, value in enumerate((1.0, tokens, seconds, tokens * tokens, tokens * seconds)):
            self._sums[place] += weight * value


class DecodeCosts:
    """Seconds of one stage's decode steps: a mean for each number of tokens seen often, the line for others."""

    def __init__(self, line: LineFit) -> None:
        self._line = line
        self._means: dict[int, tuple[int, float]] = {}  # tokens: steps seen, mean seconds

    def add(self, tokens: int, seconds: float) -> None:
        self._line.add(tokens, seconds)
        seen, mean = self._means.get(tokens, (0, 0.0))
        weight = max(MEAN_WEIGHT, 1 / (seen + 1))
        self._means[tokens] = seen + 1, mean + weight * (seconds - mean)

    def seconds(self, tokens: int) -> float:
        seen, mean = self._means.get(tokens, (0, 0.0))
        return mean if seen >= KNOWN_STEPS else self._line.seconds(tokens)


class StepCosts:
    """The costs of one plan's stages, in pipeline order."""

    def __init__(self, limits: PlanLimits) -> None:
        one = max(1e-6, limits.decode_seconds / limits.stage_count)
        stages = range(limits.stage_count)
        self._decode = [DecodeCosts(LineFit(one * (1 - PRIOR_DECODE_SHARE), one * PRIOR_DECODE_SHARE)) for _ in stages]
        self._chunks = [ChunkCosts(one) for _ in stages]
        self._ends: dict[tuple[int, int], tuple[int, ...]] = {}  # cuts of prompts, until another chunk is measured
        self._chosen: dict[int, int] = {}  # micro-batches by number of sequences
        self._steps = 0  # decode steps that came back

    def add_decode(self, token_count: int, timings: Sequence[StageTiming]) -> None:
        """Learn from a step of one token of each of its sequences."""
        self._steps += 1
        if len(timings) == len(self._decode):
            for cost, timing in zip(self._decode, timings, strict=True):
                cost.add(token_count, timing.computed_seconds)

    def add_chunks(self, token_count: int, mean_rows: float, timings: Sequence[StageTiming]) -> None:
        """Learn from a step of chunks of prompts, whose tokens attend to `mean_rows` rows."""
        if len(timings) != len(self._chunks) or token_count < SMALLEST_CHUNK_TOKENS:
            return
        self._ends.clear()
        for chunks, decode, timing in zip(self._chunks, self._decode, timings, strict=True):
            chunks.add(token_count, mean_rows, max(1e-6, timing.computed_seconds), max(1e-6, decode.seconds(1)))

    def micro_batches(self, sequences: int) -> int:
        """Return into how many steps to cut the decode tokens of `sequences` for the most tokens per second.

        With m steps in flight a round takes what the busiest stage computes for all m, or the whole trip of one if that
        is longer. One step can be best: it costs least if its fixed part is most of it.
        """
        most = min(len(self._decode), sequences)
        rounds, step_of_round = divmod(self._steps, TRIAL_INTERVAL_STEPS)
        if rounds and step_of_round < TRIAL_STEPS:  # try each cut at times, so that its costs are known
            return rounds % most + 1
        best = min(self._chosen.get(sequences, most), most)
        best_seconds = self._round_seconds(sequences, best)
        for count in range(1, most + 1):
            seconds = self._round_seconds(sequences, count)
            if seconds < best_seconds * WORTH_CHANGING:
                best, best_seconds = count, seconds
        self._chosen[sequences] = best
        return best

    def _round_seconds(self, sequences: int, count: int) -> float:
        """Predict the seconds of one token of each sequence, in `count` steps."""
        each = [cost.seconds(math.ceil(sequences / count)) for cost in self._decode]
        return max(count * max(each), sum(each))

    def chunk_ends(self, first: int, end: int) -> tuple[int, ...]:
        """Return where to cut a prompt's tokens [first, end) so that all stages compute it soonest; ends with `end`.

        A prompt that waits for room asks at every step, so cuts are remembered until a chunk is measured.
        """
        if (first, end) not in self._ends:
            if len(self._ends) >= KNOWN_ENDS:  # short prompts are no measured chunks, and so clear nothing
                self._ends.clear()
            self._ends[first, end] = self._new_ends(first, end)
        return self._ends[first, end]

    def _new_ends(self, first: int, end: int) -> tuple[int, ...]:
        fixed = [chunks.fixed_seconds for chunks in self._chunks]
        work = [chunks.seconds(first, end) for chunks in self._chunks]
        slowest = max(range(len(work)), key=lambda stage: fixed[stage] + work[stage])
        smallest = SMALLEST_CHUNK_TOKENS / (end - first)
        shares = chunk_shares(fixed, work, int(1 / smallest), smallest)
        ends: list[int] = []
        for done in itertools.accumulate(shares[:-1]):
            at = first + self._chunks[slowest].tokens_within(first, done * work[slowest])
            if ends[-1:] != [at] and at < end:
                ends.append(at)
        return (*ends, end)

    def chunk_tokens(self, first: int, ends: Sequence[int], *, others_decode: bool) -> int:
        """Return how many of a prompt's tokens from `first` on the next step takes, if it is to be cut at `ends`.

        While others decode, chunks delay each of their tokens by at most DECODE_GAP_SECONDS: as many steps are in
        flight as there are stages, and a token waits for all of them on the slowest stage. A chunk whose tokens take
        less than the part of a step that is always the same would not be worth its delay, though.
        """
        tokens = next(end for end in ends if end - first >= SMALLEST_CHUNK_TOKENS or end == ends[-1]) - first
        if not others_decode:
            return tokens
        gap = DECODE_GAP_SECONDS / len(self._chunks)
        between = min(
            chunks.tokens_within(first, max(gap - chunks.fixed_seconds, chunks.fixed_seconds))
            for chunks in self._chunks
        )
        return min(tokens, max(SMALLEST_CHUNK_TOKENS, between))
