"""What a chunk of a prompt costs on one stage, and how long to make it so that chunks cost the same; pure."""

from __future__ import annotations

import math

from services.coordinator.line_fit import LineFit

# Assumed of a token of a chunk before any is measured, as a share of a decode step: computed beside others it costs
# little, and twice as much with so many rows before it that attending takes as long as all else.
PRIOR_TOKEN_SHARE = 0.08
PRIOR_DOUBLING_ROWS = 2048


class ChunkCosts:
    """Seconds of a chunk: a fixed part, for the weights are read for each, and tokens that cost more the later.

    The fixed part is what a step of one token takes, which the decode steps tell. Chunks are cut alike and so tell it
    badly, but how much a token costs, and what the rows before it add, they tell well.
    """

    def __init__(self, decode_seconds: float) -> None:
        each = decode_seconds * PRIOR_TOKEN_SHARE
        self._token = LineFit(each, each / PRIOR_DOUBLING_ROWS, 0, PRIOR_DOUBLING_ROWS)

    def add(self, tokens: int, mean_rows: float, seconds: float, fixed_seconds: float) -> None:
        """A chunk that was measured; `mean_rows` is how many rows its tokens attend to."""
        self._token.add(mean_rows, max(0.0, seconds - fixed_seconds) / tokens)

    def seconds(self, first: int, end: int) -> float:
        """Of the tokens at positions [first, end), beside the fixed part."""
        return (end - first) * self._token.seconds((first + end) / 2)

    def tokens_within(self, first: int, seconds: float) -> int:
        """How many tokens from position `first` on take so long beside the fixed part, as `seconds` counts."""
        at_zero, per_row = self._token.line()
        at_first = at_zero + per_row * first
        if per_row * seconds > 1e-9 * at_first**2:  # n * (at_first + per_row * n / 2) = seconds, solved for n
            tokens = (math.sqrt(at_first**2 + 2 * per_row * seconds) - at_first) / per_row
        else:
            tokens = seconds / max(at_first, 1e-9)
        return max(0, math.ceil(tokens))
