"""What a chunk of a prompt costs on one stage, learnt from measured chunks, and how to cut a prompt into chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

# Before any chunk is measured, a token of one is assumed to cost this share of a decode step, as it is computed beside
# others, and twice as much with PRIOR_DOUBLING_ROWS rows to attend to.
PRIOR_TOKEN_SHARE = 0.08
PRIOR_DOUBLING_ROWS = 2048
PRIOR_TOKENS = 256  # of the two assumed chunks
PRIOR_WEIGHT = 0.02  # of each of them; a measured chunk has 1
FADE = 1 - 1 / 50  # weight of a chunk against the next one
FIXED_WEIGHT = 0.001  # of the assumption that the fixed part is a decode step
MOST_FIXED_STEPS = 3.0  # decode steps that the fixed part takes at most
# Each chunk's work as a multiple of the one before it. With two stages the best is the second one's cost over the first
# one's: then each chunk is done on the second stage just as the first one hands on the next.
GROWTH = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.45, 1.7, 2.0)
MAXIMUM_CHUNKS = 32
PATIENCE = 2  # chunks more that may be worse before no more are tried


class ChunkCosts:
    """Seconds of a chunk: a fixed part, as weights are read for each, and tokens that cost more the later they are.

    fixed + tokens * (each + per_row * rows), by least squares of the relative errors, with newer chunks weighing more.
    Chunks of one size cannot tell the fixed part from the tokens' own cost: then it is taken for a decode step of one
    token, and it is never longer than a few of these. Prompts are cut into chunks of different sizes.
    """

    def __init__(self, decode_seconds: float) -> None:
        self._products = np.zeros((3, 3))  # of 1, tokens and tokens times rows, over the seconds they took
        self._sums = np.zeros(3)
        self._found: tuple[float, float, float] | None = None
        self._step_seconds = decode_seconds
        each = decode_seconds * PRIOR_TOKEN_SHARE
        for rows in (0.0, PRIOR_DOUBLING_ROWS):
            seconds = decode_seconds + PRIOR_TOKENS * each * (1 + rows / PRIOR_DOUBLING_ROWS)
            self._put(PRIOR_TOKENS, rows, seconds, PRIOR_WEIGHT)

    def add(self, tokens: int, mean_rows: float, seconds: float, step_seconds: float) -> None:
        """Add a measured chunk, whose tokens attend to `mean_rows` rows, and the seconds of a decode step. Both > 0."""
        self._products *= FADE
        self._sums *= FADE
        self._put(tokens, mean_rows, seconds, 1.0)
        self._step_seconds = step_seconds

    @property
    def fixed_seconds(self) -> float:
        """Seconds of every chunk, however short."""
        return self._solution()[0]

    def seconds(self, first: int, end: int) -> float:
        """Predict the seconds of the tokens at positions [first, end), without the fixed part."""
        _, each, per_row = self._solution()
        return (end - first) * (each + per_row * (first + end) / 2)

    def tokens_within(self, first: int, seconds: float) -> int:
        """Count the tokens from position `first` on that take this long without the fixed part."""
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
        """Return seconds: fixed, of each token, and of each token for each row it attends to; none is below 0."""
        if self._found is None:
            products, sums = self._products.copy(), self._sums.copy()
            products[0, 0] += FIXED_WEIGHT / self._step_seconds**2
            sums[0] += FIXED_WEIGHT / self._step_seconds
            values = _solved(products, sums, [0, 1, 2])
            most_fixed = MOST_FIXED_STEPS * self._step_seconds
            if values[0] > most_fixed:  # chunks of like sizes: tokens' own cost was taken for the fixed part
                values = _solved(products, sums - products[:, 0] * most_fixed, [1, 2])
                values[0] = most_fixed
            self._found = (float(values[0]), float(values[1]), float(values[2]))
        return self._found


def _solved(products: Matrix, sums: Matrix, kept: list[int]) -> Matrix:
    """The values of `kept` by their normal equations; the others are 0, and none is below 0."""
    scale = 1 / np.sqrt(products.diagonal())
    values = np.zeros(3)
    while kept:  # a value below 0 becomes 0, and the others are solved again without it
        part = np.ix_(kept, kept)
        scaled = products[part] * np.outer(scale[kept], scale[kept])
        values[:] = 0.0
        values[kept] = scale[kept] * np.linalg.lstsq(scaled, sums[kept] * scale[kept], rcond=1e-9)[0]
        if values.min() >= 0:
            break
        kept = [each for each in kept if each != int(np.argmin(values / scale))]
    return values


def chunk_shares(
    fixed_seconds: Sequence[float], work_seconds: Sequence[float], most_chunks: int, smallest_share: float
) -> tuple[float, ...]:
    """Return the shares of a prompt's work, first chunk first, that compute it soonest.

    They sum to 1, and none is below `smallest_share`. `fixed_seconds` and `work_seconds` are each stage's, in pipeline
    order. With equal chunks the stages that wait for the first chunk, and those that work on the last one alone, lose a
    chunk's time: before a slow stage small first chunks are best, behind one small last chunks.
    """
    best: tuple[float, ...] = (1.0,)
    best_seconds = whole_seconds = pipeline_seconds(fixed_seconds, work_seconds, best)
    for growth in GROWTH if len(fixed_seconds) > 1 else ():
        least_seconds, worse = whole_seconds, 0  # with chunks of this growth
        for count in range(2, min(most_chunks, MAXIMUM_CHUNKS) + 1):
            each = [growth**place for place in range(count)]
            shares = tuple(one / sum(each) for one in each)
            if min(shares) < smallest_share or worse > PATIENCE:
                break
            seconds = pipeline_seconds(fixed_seconds, work_seconds, shares)
            worse = 0 if seconds < least_seconds else worse + 1
            least_seconds = min(least_seconds, seconds)
            if seconds < best_seconds:
                best, best_seconds = shares, seconds
    return best


def pipeline_seconds(fixed_seconds: Sequence[float], work_seconds: Sequence[float], shares: Sequence[float]) -> float:
    """Predict when the last stage has computed the last chunk, if each stage takes a chunk as soon as it can."""
    done = [0.0] * len(fixed_seconds)
    for share in shares:
        before = 0.0
        for stage, (fixed, work) in enumerate(zip(fixed_seconds, work_seconds, strict=True)):
            before = done[stage] = max(done[stage], before) + fixed + share * work
    return done[-1]
