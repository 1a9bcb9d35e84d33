"""Into which chunks to cut a prompt so that the stages compute it soonest; pure.

A chunk costs each stage a fixed part (the weights are read for each) and its share of the stage's work on the prompt.
With equal chunks the stages that wait for the first chunk, and those that work on the last one alone, lose a chunk's
time each: before a slow stage chunks are best small at first, behind one small at last.
"""

from __future__ import annotations

from collections.abc import Sequence

# Each chunk's work as a multiple of the one before it. With two stages the best is the second one's cost over the first
# one's, for then each chunk is done on the second just as the first hands on the next.
GROWTH = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.45, 1.7, 2.0)
MAXIMUM_CHUNKS = 32
PATIENCE = 2  # chunks more that may be worse, until no more are tried


def chunk_shares(
    fixed_seconds: Sequence[float], work_seconds: Sequence[float], most_chunks: int, smallest_share: float
) -> tuple[float, ...]:
    """The shares of a prompt's work, first chunk first, that sum to 1 and none of which is below `smallest_share`.

    `fixed_seconds` and `work_seconds` are each stage's, in pipeline order.
    """
    best: tuple[float, ...] = (1.0,)
    best_seconds = whole_seconds = pipeline_seconds(fixed_seconds, work_seconds, best)
    for growth in GROWTH if len(fixed_seconds) > 1 else ():
        least_seconds, worse = whole_seconds, 0  # with chunks that grow like this
        for count in range(2, min(most_chunks, MAXIMUM_CHUNKS) + 1):
            shares = _growing(count, growth)
            if min(shares) < smallest_share or worse > PATIENCE:
                break
            seconds = pipeline_seconds(fixed_seconds, work_seconds, shares)
            worse = 0 if seconds < least_seconds else worse + 1
            least_seconds = min(least_seconds, seconds)
            if seconds < best_seconds:
                best, best_seconds = shares, seconds
    return best


def pipeline_seconds(fixed_seconds: Sequence[float], work_seconds: Sequence[float], shares: Sequence[float]) -> float:
    """Until the last stage has computed the last chunk, each stage taking a chunk as soon as it can."""
    done = [0.0] * len(fixed_seconds)
    for share in shares:
        before = 0.0
        for stage, (fixed, work) in enumerate(zip(fixed_seconds, work_seconds, strict=True)):
            before = done[stage] = max(done[stage], before) + fixed + share * work
    return done[-1]


def _growing(count: int, growth: float) -> tuple[float, ...]:
    each = [growth**place for place in range(count)]
    return tuple(one / sum(each) for one in each)
