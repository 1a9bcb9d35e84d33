"""What a step costs on each stage, learnt from the steps that came back, and how to cut work by it; pure.

A stage's step of n tokens takes about `fixed + per_token * n` seconds: reading the weights, and computing. Chunks of
prompts follow that line. Steps of few tokens do not: two rows may cost half as much again as one, and eight the same as
two, for other kernels multiply them. So decode costs are kept by number of tokens too, and cuts are tried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from noodle.messages import StageTiming
from services.coordinator.session import Limits

MEMORY_STEPS = 50.0  # how many steps back count; older ones fade
PRIOR_WEIGHT = 0.5  # of what is assumed before anything is measured, in steps
# Assumed of a token more in a step, as a share of a step of one: to be replaced by what is measured.
PRIOR_DECODE_SHARE = 0.2
PRIOR_PREFILL_SHARE = 0.1
SMALLEST_CHUNK_TOKENS = 32  # below it a chunk costs nearly as much as a larger one: weights are read for each
MEAN_WEIGHT = 0.1  # of the newest step in the mean of steps with as many tokens
KNOWN_STEPS = 3  # so many steps make a mean that is better than the line
TRIAL_STEPS = 8  # how long another cut is tried out, in decode steps
TRIAL_INTERVAL_STEPS = 256  # how often
WORTH_CHANGING = 0.97  # another cut must promise this share of the seconds
DECODE_GAP_SECONDS = 0.5  # how much later a running stream's next token may be for one chunk of another's prompt


class LineFit:
    """Least squares of seconds over tokens, in which each new step counts more than the one before."""

    def __init__(self, fixed_seconds: float, seconds_per_token: float, near: int, far: int) -> None:
        self._sums = [0.0] * 5  # weight, tokens, seconds, tokens squared, tokens times seconds
        for tokens in (near, far):
            self._put(tokens, fixed_seconds + seconds_per_token * tokens, PRIOR_WEIGHT)

    def add(self, tokens: int, seconds: float) -> None:
        """One step that was measured."""
        fade = 1 - 1 / MEMORY_STEPS
        self._sums = [total * fade for total in self._sums]
        self._put(tokens, seconds, 1.0)

    def line(self) -> tuple[float, float]:
        """(fixed seconds, seconds per token), neither below 0."""
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        mean_tokens, mean_seconds = x / weight, y / weight
        slope = 0.0 if spread <= 0 else max(0.0, (weight * xy - x * y) / spread)
        slope = min(slope, mean_seconds / mean_tokens)
        return mean_seconds - slope * mean_tokens, slope

    def seconds(self, tokens: float) -> float:
        """Of a step of so many tokens."""
        fixed, per_token = self.line()
        return fixed + per_token * tokens

    def _put(self, tokens: int, seconds: float, weight: float) -> None:
        for place, value in enumerate((1.0, tokens, seconds, tokens * tokens, tokens * seconds)):
            self._sums[place] += weight * value


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

    def __init__(self, limits: Limits) -> None:
        one = max(1e-6, limits.decode_seconds / limits.stage_count)
        self._decode = [DecodeCosts(_prior(one, PRIOR_DECODE_SHARE, 1, 16)) for _ in range(limits.stage_count)]
        self._prefill = [_prior(one, PRIOR_PREFILL_SHARE, 32, 512) for _ in range(limits.stage_count)]
        self._chosen: dict[int, int] = {}  # by number of sessions
        self._steps = 0  # decode steps that came back

    def add(self, token_count: int, is_decode: bool, timings: Sequence[StageTiming]) -> None:
        """Take in a step that passed through all stages."""
        costs: Sequence[DecodeCosts | LineFit] = self._decode if is_decode else self._prefill
        self._steps += is_decode
        if len(timings) == len(costs):
            for cost, timing in zip(costs, timings, strict=True):
                cost.add(token_count, timing.computed_seconds)

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

    def chunk_tokens(self, prompt_tokens: int, *, others_decode: bool) -> int:
        """How many tokens of a prompt one step takes.

        k chunks over S stages take (k + S - 1) times one of `fixed + per_token * prompt / k` on the slowest, which is
        least at k = sqrt((S - 1) * per_token * prompt / fixed). While others decode, a chunk keeps them waiting.
        """
        fixed, per_token = max((fit.line() for fit in self._prefill), key=lambda line: line[0] + line[1] * 256)
        chunks = math.sqrt((len(self._prefill) - 1) * per_token * prompt_tokens / max(fixed, 1e-6))
        tokens = math.ceil(prompt_tokens / max(1, round(chunks)))
        if others_decode and per_token > 0:
            tokens = min(tokens, int((DECODE_GAP_SECONDS - fixed) / per_token))
        return max(SMALLEST_CHUNK_TOKENS, tokens)


def _prior(one_seconds: float, share: float, near: int, far: int) -> LineFit:
    return LineFit(one_seconds * (1 - share), one_seconds * share, near, far)
