"""What a chunk of a prompt costs on one stage, learnt from those that came back; pure."""

from __future__ import annotations

import math

import numpy as np

# Assumed of a token of a chunk before any is measured, as a share of a decode step: computed beside others it costs
# little, and twice as much with so many rows before it that attending takes as long as all else.
PRIOR_TOKEN_SHARE = 0.08
PRIOR_DOUBLING_ROWS = 2048
PRIOR_TOKENS = 256  # of the two chunks that are assumed
PRIOR_WEIGHT = 0.02  # of each of them; a chunk that was measured has 1
MEMORY_CHUNKS = 50.0  # how many chunks back count
FIXED_WEIGHT = 0.001  # of the belief that the fixed part is a decode step


class ChunkCosts:
    """Seconds of a chunk: a fixed part, for the weights are read for each, and tokens that cost more the later.

    fixed + tokens * (each + per_row * rows), by least squares of the relative errors, in which each chunk counts more
    than those before. Chunks of one size can not tell the fixed part from the tokens' own: then it is taken for a step
    of one token, which the decode steps tell; those that prompts are cut into differ in size.
    """

    def __init__(self, decode_seconds: float) -> None:
        self._products = np.zeros((3, 3))  # of 1, tokens and tokens times rows, over the seconds they took
        self._sums = np.zeros(3)
        self._found: tuple[float, float, float] | None = None
        each = decode_seconds * PRIOR_TOKEN_SHARE
        for rows in (0.0, PRIOR_DOUBLING_ROWS):
            seconds = decode_seconds + PRIOR_TOKENS * each * (1 + rows / PRIOR_DOUBLING_ROWS)
            self._put(PRIOR_TOKENS, rows, seconds, PRIOR_WEIGHT)
        self._step_seconds = decode_seconds

    def add(self, tokens: int, mean_rows: float, seconds: float, step_seconds: float) -> None:
        """A chunk that was measured; `mean_rows` is how many rows its tokens attend to, `step_seconds` a decode step's.

        Both seconds are above 0.
        """
        fade = 1 - 1 / MEMORY_CHUNKS
        self._products *= fade
        self._sums *= fade
        self._put(tokens, mean_rows, seconds, 1.0)
        self._step_seconds = step_seconds

    @property
    def fixed_seconds(self) -> float:
        """Of every chunk, however short."""
        return self._solution()[0]

    def seconds(self, first: int, end: int) -> float:
        """Of the tokens at positions [first, end), beside the fixed part."""
        _, each, per_row = self._solution()
        return (end - first) * (each + per_row * (first + end) / 2)

    def tokens_within(self, first: int, seconds: float) -> int:
        """How many tokens from position `first` on take so long beside the fixed part, as `seconds` counts."""
        _, each, per_row = self._solution()
        at_first = each + per_row * first
        if per_row * seconds > 1e-9 * at_first**2:  # n * (at_first + per_row * n / 2) = seconds, solved for n
            tokens = (math.sqrt(at_first**2 + 2 * per_row * seconds) - at_first) / per_row
        else:
            tokens = seconds / max(at_first, 1e-9)
        return max(0, math.ceil(tokens))

    def _put(self, tokens: int, mean_rows: float, seconds: float, weight: float) -> None:
        amounts = np.array([1.0, tokens, tokens * mean_rows]) / seconds
        self._products += weight * np.outer(amounts, amounts)
        self._sums += weight * amounts
        self._found = None

    def _solution(self) -> tuple[float, float, float]:
        """Seconds: fixed, of each token, and of each token for each row it attends to; none is below 0."""
        if self._found is None:
            products, sums = self._products.copy(), self._sums.copy()
            products[0, 0] += FIXED_WEIGHT / self._step_seconds**2
            sums[0] += FIXED_WEIGHT / self._step_seconds
            scale = 1 / np.sqrt(products.diagonal())
            kept = [0, 1, 2]
            values = np.zeros(3)
            while kept:  # what would be below 0 is 0, and the others are found again without it
                part = np.ix_(kept, kept)
                scaled = products[part] * np.outer(scale[kept], scale[kept])
                values[:] = 0.0
                values[kept] = scale[kept] * np.linalg.lstsq(scaled, sums[kept] * scale[kept], rcond=1e-9)[0]
                if values.min() >= 0:
                    break
                kept.remove(int(np.argmin(values / scale)))
            self._found = (float(values[0]), float(values[1]), float(values[2]))
        return self._found
