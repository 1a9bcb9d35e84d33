"""Cuts a model's layers over machines: a pure function from measurements to a plan, which knows no network and no file.

The cut makes the slowest stage as fast as can be, since with every stage at work that one sets the pace; among such
cuts it takes the one with the smallest sum, which is what a single session waits for. Both by exact dynamic
programming over a matrix per stage, [start_layer, end_layer] -> seconds, infinite where the slice does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noodle.errors import ConfigurationError, PlanDoesNotFit
from noodle.plan import MachineReport, ModelShape, Plan, StageAssignment
from services.planner.prediction import HopCost, in_words, predict, stage_decode_seconds

# of the free memory a machine reports; the rest is for activations, the allocator's waste, and what else runs there
USABLE_SHARE = 0.85
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# a quantized executor reports its own name: ggml's Q8_0 keeps 34 bytes for 32 items, and K and V as float16
QUANTIZED_BYTES = {"q8_0": 34 / 32}
QUANTIZED_KV_BYTES = 2

Matrix = npt.NDArray[np.float64]  # [layer_count + 1, layer_count + 1], indexed [start_layer, end_layer]


@dataclass(frozen=True, slots=True)
class _Problem:
    """What the search works on: per stage the seconds and bytes of every slice, per memory what may be used."""

    machines: tuple[MachineReport, ...]
    layer_count: int
    seconds: tuple[Matrix, ...]  # infinite where start >= end
    memory_bytes: tuple[Matrix, ...]
    memories: tuple[tuple[int, ...], ...]  # indices of the stages that share one memory
    usable_bytes: tuple[float, ...]  # of each of those


def partition(
    shape: ModelShape,
    machines: Sequence[MachineReport],
    split: tuple[int, ...] | None,
    *,
    version: int,
    kv_tokens: int,
    hop: HopCost,
) -> Plan:
    """The plan for `machines` in stage order; `kv_tokens` are the KV rows every stage must have room for.

    `split` (layers per stage) is taken as it is, if it adds up and fits. Stages of one machine and device share its
    memory, the smallest free_bytes that any of them reports. Raises PlanDoesNotFit, and ConfigurationError for a
    split that means nothing.
    """
    ordered = tuple(sorted(machines, key=lambda machine: machine.stage_id))
    _check_machines(shape, ordered)
    problem = _problem(shape, ordered, kv_tokens)
    if split is not None:
        _check_split(split, shape, ordered)
        ends = [int(end) for end in np.cumsum(split)]
        if not _fits(problem, ends):
            raise _does_not_fit(shape, problem, kv_tokens, ends)
        why = f"Cut as NOODLE_SPLIT={','.join(map(str, split))} says"
    else:
        found = _best_cut(problem)
        if found is None:
            raise _does_not_fit(shape, problem, kv_tokens, None)
        ends = found
        why = "Cut so that the slowest stage is as fast as can be"
    stages = _assignments(problem, shape, ends)
    prediction = predict(stages, {machine.stage_id: machine for machine in ordered}, hop)
    return Plan(
        version=version,
        model_digest=shape.digest,
        layer_count=shape.layer_count,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        stages=stages,
        reason=f"{why}: {in_words(prediction)}.",
    )


def _check_machines(shape: ModelShape, machines: tuple[MachineReport, ...]) -> None:
    if not machines:
        raise PlanDoesNotFit("There is no stage to compute the model.", cure="Start at least one stage.")
    stage_ids = [machine.stage_id for machine in machines]
    if len(set(stage_ids)) != len(stage_ids):
        raise PlanDoesNotFit(
            f"Two stages have the same number ({stage_ids}).", cure="Give each stage its own NOODLE_STAGE_ID."
        )
    if len(machines) > shape.layer_count:
        raise PlanDoesNotFit(
            f"There are {len(machines)} stages for the {shape.layer_count} layers of {shape.name}.",
            cure=f"Start at most {shape.layer_count} stages: each computes at least one layer.",
        )
    for machine in machines:
        where = f"Stage {machine.stage_id} ({machine.machine})"
        if machine.model_digest != shape.digest:
            raise PlanDoesNotFit(
                f"{where} has other weights ({machine.model_digest[:12]}) than the planner ({shape.digest[:12]}).",
                cure="Set NOODLE_MODEL to the same model on every machine, and fetch it again where it is older.",
            )
        if machine.dtype not in DTYPE_BYTES and machine.dtype not in QUANTIZED_BYTES:
            raise PlanDoesNotFit(
                f"{where} computes in {machine.dtype!r}, whose size in memory is not known here.",
                cure=f"Set its NOODLE_DTYPE to one of {', '.join((*DTYPE_BYTES, *QUANTIZED_BYTES))}.",
            )
        numbers = (machine.decode_layer_seconds, machine.prefill_layer_seconds_per_token)
        may_be_zero = machine.head_decode_seconds
        if not all(math.isfinite(it) and it > 0 for it in numbers) or not math.isfinite(may_be_zero) or may_be_zero < 0:
            raise PlanDoesNotFit(
                f"{where} reports layer seconds that can not be ({', '.join(map(str, numbers))}, {may_be_zero}).",
                cure="Delete the measurements in its NOODLE_CACHE_DIR and start it again.",
            )


def _check_split(split: tuple[int, ...], shape: ModelShape, machines: tuple[MachineReport, ...]) -> None:
    written = f"NOODLE_SPLIT={','.join(map(str, split))}"
    if len(split) != len(machines):
        raise ConfigurationError(
            f"{written} is for {len(split)} stages, but there are {len(machines)}.",
            cure="Name as many numbers as stages, or leave it unset.",
        )
    if min(split) < 1:
        raise ConfigurationError(
            f"{written} gives a stage {min(split)} layers.", cure="Each stage computes at least one layer."
        )
    if sum(split) != shape.layer_count:
        raise ConfigurationError(
            f"{written} adds up to {sum(split)} layers, but {shape.name} has {shape.layer_count}.",
            cure=f"Choose numbers that add up to {shape.layer_count}, or leave it unset.",
        )


def _weight_ratio(shape: ModelShape, machine: MachineReport) -> float:
    """Bytes in the machine's memory for each byte in the weight files."""
    return (DTYPE_BYTES.get(machine.dtype) or QUANTIZED_BYTES[machine.dtype]) / shape.stored_item_bytes


def _problem(shape: ModelShape, machines: tuple[MachineReport, ...], kv_tokens: int) -> _Problem:
    count = shape.layer_count
    prefix_bytes = np.concatenate([[0], np.cumsum(np.asarray(shape.layer_bytes, dtype=np.float64))])
    layers = np.arange(count + 1)[None, :] - np.arange(count + 1)[:, None]  # [start, end] -> layers between
    seconds: list[Matrix] = []
    memory_bytes: list[Matrix] = []
    groups: dict[tuple[str, str], list[int]] = {}
    for index, machine in enumerate(machines):
        is_last = index == len(machines) - 1
        by_layers = np.array([stage_decode_seconds(machine, taken, is_last=is_last) for taken in range(count + 1)])
        seconds.append(np.where(layers > 0, by_layers[np.maximum(layers, 0)], np.inf))
        weights = prefix_bytes[None, :] - prefix_bytes[:, None]
        weights += (shape.embedding_bytes if index == 0 else 0) + (shape.head_bytes if is_last else 0)
        kv_item_bytes = DTYPE_BYTES.get(machine.dtype, QUANTIZED_KV_BYTES)
        kv_bytes_per_layer = kv_tokens * shape.kv_items_per_token_per_layer * kv_item_bytes
        memory_bytes.append(weights * _weight_ratio(shape, machine) + layers * kv_bytes_per_layer)
        groups.setdefault((machine.machine, machine.device), []).append(index)
    memories = tuple(tuple(indices) for indices in groups.values())
    usable = tuple(USABLE_SHARE * min(machines[index].free_bytes for index in indices) for indices in memories)
    return _Problem(machines, count, tuple(seconds), tuple(memory_bytes), memories, usable)


def _best_cut(problem: _Problem, extra_bytes: float = 0.0) -> list[int] | None:
    """The end layer of each stage in the best cut, or None; each memory is taken to be `extra_bytes` larger."""
    allowed = _allowed_alone(problem, extra_bytes)
    slowest_seconds = _smallest_maximum(allowed)
    if math.isinf(slowest_seconds):
        return None
    ends = _smallest_sum([np.where(matrix <= slowest_seconds, matrix, np.inf) for matrix in allowed])
    if ends is not None and _fits(problem, ends, extra_bytes):
        return ends
    # stages that share a memory fit one by one, but not together: search with what each memory holds so far
    candidates = np.unique(np.concatenate([matrix[np.isfinite(matrix)] for matrix in allowed]))
    candidates = candidates[candidates >= slowest_seconds]
    first, last = 0, len(candidates) - 1
    best: list[int] | None = None
    while first <= last:
        middle = (first + last) // 2
        limit = candidates[middle]
        limited = [np.where(matrix <= limit, matrix, np.inf) for matrix in allowed]
        tried = _smallest_sum_in_shared_memory(problem, limited, extra_bytes)
        if tried is None:
            first = middle + 1
        else:
            best, last = tried, middle - 1
    return best


def _allowed_alone(problem: _Problem, extra_bytes: float) -> list[Matrix]:
    """Seconds of every slice, infinite where a stage could not hold it even if it had its memory for itself."""
    usable = {
        index: limit for indices, limit in zip(problem.memories, problem.usable_bytes, strict=True) for index in indices
    }
    return [
        np.where(problem.memory_bytes[index] <= usable[index] + extra_bytes, matrix, np.inf)
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
class _Partial:
    """The first stages' cut: its end layers, the seconds so far, and the bytes each open memory holds."""

    ends: tuple[int, ...]
    seconds: float
    held_bytes: tuple[float, ...]


def _smallest_sum_in_shared_memory(problem: _Problem, allowed: list[Matrix], extra_bytes: float) -> list[int] | None:
    """As _smallest_sum, with what stages of one memory hold together in bounds.

    Keeps for every end layer all partial cuts of which none is better in seconds and in every memory at once. A
    memory whose last stage is placed no longer counts, so machines whose stages follow one another stay cheap.
    """
    limits = [limit + extra_bytes for limit in problem.usable_bytes]
    memory_of = {index: number for number, indices in enumerate(problem.memories) for index in indices}
    reached: dict[int, list[_Partial]] = {0: [_Partial((), 0.0, (0.0,) * len(limits))]}
    for index, matrix in enumerate(allowed):
        memory = memory_of[index]
        closes = problem.memories[memory][-1] == index
        following: dict[int, list[_Partial]] = {}
        for start, partials in reached.items():
            for end in np.flatnonzero(np.isfinite(matrix[start])).tolist():
                more_bytes = float(problem.memory_bytes[index][start, end])
                for partial in partials:
                    held = partial.held_bytes[memory] + more_bytes
                    if held <= limits[memory]:
                        held_bytes = list(partial.held_bytes)
                        held_bytes[memory] = 0.0 if closes else held
                        following.setdefault(end, []).append(
                            _Partial(
                                (*partial.ends, end), partial.seconds + float(matrix[start, end]), tuple(held_bytes)
                            )
                        )
        reached = {end: _undominated(partials) for end, partials in following.items()}
    whole = reached.get(problem.layer_count)
    return list(min(whole, key=lambda partial: partial.seconds).ends) if whole else None


def _undominated(partials: list[_Partial]) -> list[_Partial]:
    kept: list[_Partial] = []
    for partial in sorted(partials, key=lambda it: (it.seconds, it.held_bytes)):
        better = any(
            all(ours <= theirs for ours, theirs in zip(other.held_bytes, partial.held_bytes, strict=True))
            for other in kept
        )
        if not better:
            kept.append(partial)
    return kept


def _held_bytes(problem: _Problem, ends: Sequence[int]) -> list[float]:
    """What each memory holds with this cut."""
    starts = [0, *ends[:-1]]
    return [
        sum(float(problem.memory_bytes[index][starts[index], ends[index]]) for index in indices)
        for indices in problem.memories
    ]


def _fits(problem: _Problem, ends: Sequence[int], extra_bytes: float = 0.0) -> bool:
    return all(
        held <= limit + extra_bytes
        for held, limit in zip(_held_bytes(problem, ends), problem.usable_bytes, strict=True)
    )


def _assignments(problem: _Problem, shape: ModelShape, ends: Sequence[int]) -> tuple[StageAssignment, ...]:
    stages = []
    for index, (machine, start, end) in enumerate(zip(problem.machines, [0, *ends[:-1]], ends, strict=True)):
        stored_bytes = sum(shape.layer_bytes[start:end])
        stored_bytes += shape.embedding_bytes if index == 0 else 0
        stored_bytes += shape.head_bytes if index == len(ends) - 1 else 0
        stages.append(
            StageAssignment(
                stage_id=machine.stage_id,
                machine=machine.machine,
                url=machine.url,
                start_layer=start,
                end_layer=end,
                dtype=machine.dtype,
                weight_bytes=round(stored_bytes * _weight_ratio(shape, machine)),
                decode_seconds=float(problem.seconds[index][start, end]),
            )
        )
    return tuple(stages)


def _does_not_fit(shape: ModelShape, problem: _Problem, kv_tokens: int, ends: Sequence[int] | None) -> PlanDoesNotFit:
    """Says what is short: of the given cut on its tightest memory, else the least that would have to be freed."""
    if ends is not None:
        held = _held_bytes(problem, ends)
        missing = [needed - limit for needed, limit in zip(held, problem.usable_bytes, strict=True)]
        worst = max(range(len(missing)), key=lambda number: missing[number])
        names = ", ".join(str(problem.machines[index].stage_id) for index in problem.memories[worst])
        what = (
            f"This split does not fit: stage {names} needs {math.ceil(held[worst])} bytes "
            f"(weights and KV rows of {kv_tokens} tokens), {math.floor(problem.usable_bytes[worst])} are usable, "
            f"{math.ceil(missing[worst])} bytes short."
        )
        cure = "Give that stage fewer layers, or free memory on its machine."
    else:
        short = _shortage_bytes(problem)
        usable = math.floor(sum(problem.usable_bytes))
        each = "on each machine " if len(problem.memories) > 1 else ""
        what = (
            f"{shape.name} with KV rows of {kv_tokens} tokens does not fit into the {usable} usable bytes "
            f"({USABLE_SHARE:.0%} of the free memory of {len(problem.memories)} machines): {each}{short} bytes short."
        )
        cure = (
            "Close other programs, add a stage on another machine, choose a smaller NOODLE_DTYPE, "
            "or a smaller NOODLE_CONTEXT_LENGTH."
        )
    return PlanDoesNotFit(what, cure=cure)


def _shortage_bytes(problem: _Problem) -> int:
    """The least bytes that, added to every memory alike, make some cut fit."""
    enough = math.ceil(sum(float(np.abs(matrix).max()) for matrix in problem.memory_bytes))
    too_few = 0
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if _best_cut(problem, middle) is None:
            too_few = middle
        else:
            enough = middle
    return enough
