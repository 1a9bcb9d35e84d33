"""Find the best cut of a row of layers into one slice per stage, given seconds and bytes of every slice.

The best cut makes the slowest stage as fast as possible, because that stage sets the pace when all have work; among
such cuts it has the smallest sum, which is what a single session waits for. Dynamic programming over one matrix per
stage, [start_layer, end_layer] -> seconds, infinite where the slice does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]  # [layer_count + 1, layer_count + 1], indexed [start_layer, end_layer]

# Partial cuts kept for each end layer while stages share memory. Layers of equal size never reach it, so the search is
# exact for them; it bounds the time for layers of many sizes on stages that alternate between nearly full machines,
# where an exact search grows exponentially.
MAXIMUM_PARTIAL_CUTS = 128


@dataclass(frozen=True, slots=True)
class CutProblem:
    """Seconds and bytes of every slice for each stage, and the memories that stages share."""

    layer_count: int
    seconds: tuple[Matrix, ...]  # infinite where start >= end
    memory_bytes: tuple[Matrix, ...]
    memories: tuple[tuple[int, ...], ...]  # indices of the stages that share each memory
    usable_bytes: tuple[float, ...]  # of each memory


def best_cut(problem: CutProblem, extra_bytes: float = 0.0) -> list[int] | None:
    """The end layer of each stage in the best cut, or None; every memory counts as `extra_bytes` larger."""
    allowed = _allowed_alone(problem, extra_bytes)
    slowest_seconds = _smallest_maximum(allowed)
    if math.isinf(slowest_seconds):
        return None
    ends = _smallest_sum([np.where(matrix <= slowest_seconds, matrix, np.inf) for matrix in allowed])
    if ends is not None and cut_fits(problem, ends, extra_bytes):
        return ends
    # stages that share a memory fit one by one but not together: search with the bytes each memory holds so far
    candidates = np.unique(np.concatenate([matrix[np.isfinite(matrix)] for matrix in allowed]))
    candidates = candidates[candidates >= slowest_seconds]
    first, last = 0, len(candidates) - 1
    best: list[int] | None = None
    while first <= last:
        middle = (first + last) // 2
        limited = [np.where(matrix <= candidates[middle], matrix, np.inf) for matrix in allowed]
        tried = _smallest_sum_in_shared_memory(problem, limited, extra_bytes)
        if tried is None:
            first = middle + 1
        else:
            best, last = tried, middle - 1
    return best


def shortage_bytes(problem: CutProblem) -> int:
    """Bytes that make some cut fit when added to every memory; at most a ten-thousandth more than the least."""
    all_bytes = math.ceil(sum(float(np.abs(matrix).max()) for matrix in problem.memory_bytes))
    return boundary(lambda extra: some_cut_fits(problem, extra), all_bytes, 0, step=max(1, all_bytes // 10_000))


def boundary(fits: Callable[[int], bool], fitting: int, failing: int, *, step: int = 1) -> int:
    """Bisect to a value that fits, within `step` of one that does not."""
    while abs(failing - fitting) > step:
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting


def some_cut_fits(problem: CutProblem, extra_bytes: float = 0.0) -> bool:
    """Whether any cut fits, every memory being `extra_bytes` larger; cheaper than finding the best cut."""
    allowed = _allowed_alone(problem, extra_bytes)
    ends = _smallest_sum(allowed)
    if ends is None or cut_fits(problem, ends, extra_bytes):
        return ends is not None
    return _smallest_sum_in_shared_memory(problem, allowed, extra_bytes) is not None


def held_bytes(problem: CutProblem, ends: Sequence[int]) -> list[float]:
    starts = [0, *ends[:-1]]
    return [
        sum(float(problem.memory_bytes[index][starts[index], ends[index]]) for index in indices)
        for indices in problem.memories
    ]


def cut_fits(problem: CutProblem, ends: Sequence[int], extra_bytes: float = 0.0) -> bool:
    """Whether this cut fits, every memory being `extra_bytes` larger."""
    return all(
        held <= limit + extra_bytes for held, limit in zip(held_bytes(problem, ends), problem.usable_bytes, strict=True)
    )


def _allowed_alone(problem: CutProblem, extra_bytes: float) -> list[Matrix]:
    """Seconds of every slice, infinite where the stage could not hold it even with its memory to itself."""
    usable = dict.fromkeys(range(len(problem.seconds)), 0.0)
    for indices, limit in zip(problem.memories, problem.usable_bytes, strict=True):
        usable.update(dict.fromkeys(indices, limit + extra_bytes))
    return [
        np.where(problem.memory_bytes[index] <= usable[index], matrix, np.inf)
        for index, matrix in enumerate(problem.seconds)
    ]


def _smallest_maximum(allowed: list[Matrix]) -> float:
    reached = np.full(allowed[0].shape[0], np.inf)  # [end] -> slowest stage so far
    reached[0] = 0.0
    for matrix in allowed:
        reached = np.maximum(reached[:, None], matrix).min(axis=0)
    return float(reached[-1])


def _smallest_sum(allowed: list[Matrix]) -> list[int] | None:
    reached = np.full(allowed[0].shape[0], np.inf)  # [end] -> sum so far
    reached[0] = 0.0
    starts: list[npt.NDArray[np.intp]] = []
    for matrix in allowed:
        sums = reached[:, None] + matrix
        starts.append(sums.argmin(axis=0))
        reached = sums.min(axis=0)
    if math.isinf(reached[-1]):
        return None
    ends = [len(reached) - 1]
    for chosen in reversed(starts[1:]):
        ends.append(int(chosen[ends[-1]]))
    return ends[::-1]


@dataclass(frozen=True, slots=True)
class _Partials:
    """Partial cuts, one per row; none is better than another in all columns of `costs`."""

    costs: npt.NDArray[np.float64]  # [cuts, 1 + memories]: sum of seconds, bytes held by each open memory
    ends: npt.NDArray[np.int64]  # [cuts, stages so far]


def _smallest_sum_in_shared_memory(problem: CutProblem, allowed: list[Matrix], extra_bytes: float) -> list[int] | None:
    """Like _smallest_sum, but also bounds the bytes that the stages of one memory hold together.

    A memory is closed once its last stage is placed, so machines with consecutive stages stay cheap.
    """
    column_of = {index: number + 1 for number, indices in enumerate(problem.memories) for index in indices}
    reached = _Partials(np.zeros((1, 1 + len(problem.memories))), np.zeros((1, 0), dtype=np.int64))
    for index, matrix in enumerate(allowed):
        column = column_of[index]
        limit = problem.usable_bytes[column - 1] + extra_bytes
        closes = problem.memories[column - 1][-1] == index
        starts = reached.ends[:, -1] if index else np.zeros(1, dtype=np.int64)
        following: list[_Partials] = []
        for end in range(index + 1, problem.layer_count + 1):
            costs = reached.costs.copy()
            costs[:, 0] += matrix[starts, end]
            costs[:, column] += problem.memory_bytes[index][starts, end]
            kept = np.flatnonzero(np.isfinite(costs[:, 0]) & (costs[:, column] <= limit))
            if not len(kept):
                continue
            costs = costs[kept]
            if closes:
                costs[:, column] = 0.0
            ends = np.column_stack([reached.ends[kept], np.full(len(kept), end)])
            following.append(_undominated(_Partials(costs, ends)))
        if not following:
            return None
        reached = _Partials(
            np.concatenate([partials.costs for partials in following]),
            np.concatenate([partials.ends for partials in following]),
        )
    whole = reached.ends[:, -1] == problem.layer_count
    if not whole.any():
        return None
    best = np.where(whole, reached.costs[:, 0], np.inf).argmin()
    return [int(end) for end in reached.ends[best]]


def _undominated(partials: _Partials) -> _Partials:
    """Drop partial cuts that another one matches or beats in every column; thin out to MAXIMUM_PARTIAL_CUTS."""
    # among equal bytes in every memory only the fastest counts, and sorting by seconds puts it first
    order = np.argsort(partials.costs[:, 0], kind="stable")
    _, firsts = np.unique(partials.costs[order][:, 1:], axis=0, return_index=True)
    order = _thinned(order[np.sort(firsts)], 4 * MAXIMUM_PARTIAL_CUTS)
    costs = partials.costs[order]
    # [one, other]: the other precedes it and is as good in every column
    as_good = (costs[None, :, :] <= costs[:, None, :]).all(axis=2) & np.tri(len(costs), k=-1, dtype=bool)
    kept = _thinned(order[~as_good.any(axis=1)], MAXIMUM_PARTIAL_CUTS)
    return _Partials(partials.costs[kept], partials.ends[kept])


def _thinned(order: npt.NDArray[np.intp], maximum: int) -> npt.NDArray[np.intp]:
    """At most `maximum` items, evenly spread from the fastest to the slowest, both kept."""
    if len(order) <= maximum:
        return order
    return order[np.linspace(0, len(order) - 1, maximum).round().astype(np.intp)]
