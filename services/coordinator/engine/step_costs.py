"""What a step costs on each stage, learnt from the steps that came back, and how to cut work by it; pure.

A stage's step of n tokens takes about `fixed + per_token * n` seconds: reading the weights, and computing. Chunks of
prompts follow that (chunk_costs.py). Steps of few tokens do not: two rows may cost half as much again as one, and eight
the same as two, for other kernels multiply them. So decode costs are kept by number of tokens too, and cuts are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from noodle.wire.messages import StageTiming
from services.coordinator.engine.chunk_costs import ChunkCosts
from services.coordinator.engine.line_fit import LineFit
from services.coordinator.engine.prompt_chunks import chunk_shares
from services.coordinator.engine.sequence import PlanLimits

# Assumed of a token more in a step, as a share of a step of one: to be replaced by what is measured.
PRIOR_DECODE_SHARE = 0.2
SMALLEST_CHUNK_TOKENS = 32  # below it a chunk costs nearly as much as a larger one: weights are read for each
MEAN_WEIGHT = 0.1  # of the newest step in the mean of steps with as many tokens
KNOWN_ENDS = 256  # prompts of which it is remembered where they are cut
KNOWN_STEPS = 3  # so many steps make a mean that is better than the line
TRIAL_STEPS = 8  # how long another cut is tried out, in decode steps
TRIAL_INTERVAL_STEPS = 256  # how often
WORTH_CHANGING = 0.97  # another cut must promise this share of the seconds
DECODE_GAP_SECONDS = 0.25  # how much later a running stream's next token may be for one chunk of another's prompt


class DecodeCosts:
    """Of one stage's decode steps: a mean for each number of tokens that has been seen, and a line for the others."""

    def __init__(self, line: LineFit) -> None:
        self._line = line
        self._means: dict[int, tuple[int, float]] = {}  # tokens: steps seen, mean seconds

    def add(self, tokens: int, seconds: float) -> None:
        """One step that was measured."""
        self._line.add(tokens, seconds)
        seen, mean = self._means.get(tokens, (0, 0.0))
        weight = max(MEAN_WEIGHT, 1 / (seen + 1))
        self._means[tokens] = seen + 1, mean + weight * (seconds - mean)

    def seconds(self, tokens: int) -> float:
        """Of a step of so many tokens."""
        seen, mean = self._means.get(tokens, (0, 0.0))
        return mean if seen >= KNOWN_STEPS else self._line.seconds(tokens)


class StepCosts:
    """The costs of one plan's stages, in pipeline order."""

    def __init__(self, limits: PlanLimits) -> None:
        one = max(1e-6, limits.decode_seconds / limits.stage_count)
        stages = range(limits.stage_count)
        self._decode = [
            DecodeCosts(LineFit(one * (1 - PRIOR_DECODE_SHARE), one * PRIOR_DECODE_SHARE, 1, 16)) for _ in stages
        ]
        self._chunks = [ChunkCosts(one) for _ in stages]
        self._ends: dict[tuple[int, int], tuple[int, ...]] = {}  # of prompts, by what was learnt of chunks until now
        self._chosen: dict[int, int] = {}  # by number of sessions
        self._steps = 0  # decode steps that came back

    def add_decode(self, token_count: int, timings: Sequence[StageTiming]) -> None:
        """Take in a step of one token of each of its sessions, which passed through all stages."""
        self._steps += 1
        if len(timings) == len(self._decode):
            for cost, timing in zip(self._decode, timings, strict=True):
                cost.add(token_count, timing.computed_seconds)

    def add_chunks(self, token_count: int, mean_rows: float, timings: Sequence[StageTiming]) -> None:
        """Take in a step of chunks of prompts, whose tokens attend to so many rows each."""
        if len(timings) != len(self._chunks) or token_count < SMALLEST_CHUNK_TOKENS:
            return
        self._ends.clear()
        for chunks, decode, timing in zip(self._chunks, self._decode, timings, strict=True):
            chunks.add(token_count, mean_rows, max(1e-6, timing.computed_seconds), max(1e-6, decode.seconds(1)))

    def micro_batches(self, sessions: int) -> int:
        """Into how many steps to cut the decode tokens of so many sessions, for the most tokens per second.

        With m steps on their way, a round takes what the busiest stage computes for all m, or the whole way of one if
        that is longer. One is allowed: a step of all costs least where a step's fixed part is most of it.
        """
        most = min(len(self._decode), sessions)
        rounds, step_of_round = divmod(self._steps, TRIAL_INTERVAL_STEPS)
        if rounds and step_of_round < TRIAL_STEPS:  # now and then another cut, so that its costs are known
            return rounds % most + 1
        best = min(self._chosen.get(sessions, most), most)
        best_seconds = self._round_seconds(sessions, best)
        for count in range(1, most + 1):
            seconds = self._round_seconds(sessions, count)
            if seconds < best_seconds * WORTH_CHANGING:
                best, best_seconds = count, seconds
        self._chosen[sessions] = best
        return best

    def _round_seconds(self, sessions: int, count: int) -> float:
        """What one token of each session takes, in so many steps."""
        each = [cost.seconds(math.ceil(sessions / count)) for cost in self._decode]
        return max(count * max(each), sum(each))

    def chunk_ends(self, first: int, end: int) -> tuple[int, ...]:
        """Where to cut a prompt's tokens [first, end), so that all stages have computed it soonest; ends with `end`.

        A prompt that waits for room asks at every step: it is only found anew when a chunk has been measured.
        """
        if (first, end) not in self._ends:
            if len(self._ends) >= KNOWN_ENDS:  # short prompts teach nothing of chunks, and so clear nothing
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
        """How many of a prompt's tokens from `first` on the next step takes, if the prompt is to be cut at `ends`.

        While others decode, a chunk keeps them waiting no longer than they may, on any stage.
        """
        tokens = next(end for end in ends if end - first >= SMALLEST_CHUNK_TOKENS or end == ends[-1]) - first
        if not others_decode:
            return tokens
        between = min(
            chunks.tokens_within(first, max(0.0, DECODE_GAP_SECONDS - chunks.fixed_seconds)) for chunks in self._chunks
        )
        return min(tokens, max(SMALLEST_CHUNK_TOKENS, between))
