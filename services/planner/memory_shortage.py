"""Why a model does not fit: how many bytes are short, on which machine, and what would cure it; pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from noodle.cluster.plan import MachineReport, ModelShape
from services.planner.cut_search import best_cut, cut_fits, held_bytes, shortage_bytes, some_cut_fits
from services.planner.partition import USABLE_SHARE, cut_problem

FEWER_BITS = {"cpu": "bfloat16", "cuda": "float16", "vulkan": "float16"}  # of a machine that computes in float32
SMALLEST_USEFUL_TOKENS = 64  # a context below it cures nothing
MOST_MACHINE_BYTES = 1 << 50


class ShortMemory(msgspec.Struct, frozen=True):
    """One memory that would hold too much; with the cut that comes closest, or the one that was asked for."""

    machine: str
    device: str
    stage_ids: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]  # [start_layer, end_layer) of each of these stages
    needed_bytes: int
    usable_bytes: int
    short_bytes: int


class Cure(msgspec.Struct, frozen=True):
    """One thing that, done alone, makes it fit."""

    kind: str  # free_memory, fewer_bits, shorter_context, another_machine, smaller_model, no_split
    text: str
    value: int = 0  # bytes, or tokens


class Shortage(msgspec.Struct, frozen=True):
    """All of it."""

    short_bytes: int  # of all memories together
    memories: tuple[ShortMemory, ...]
    cures: tuple[Cure, ...]


def shortage(
    shape: ModelShape, machines: Sequence[MachineReport], split: tuple[int, ...] | None, kv_tokens: int
) -> Shortage:
    """For machines in stage order that `partition` refused with MemoryShort."""
    problem = cut_problem(shape, machines, kv_tokens)
    if split is None:
        extra_bytes = shortage_bytes(problem)
        ends = best_cut(problem, extra_bytes)
        assert ends is not None  # noqa: S101  # shortage_bytes gives as many as make some cut fit
    else:
        ends = [int(end) for end in np.cumsum(split)]
    starts = [0, *ends[:-1]]
    memories = []
    for indices, held, usable in zip(problem.memories, held_bytes(problem, ends), problem.usable_bytes, strict=True):
        if held > usable:
            first = machines[indices[0]]
            memories.append(
                ShortMemory(
                    first.machine,
                    first.device,
                    tuple(machines[index].stage_id for index in indices),
                    tuple((starts[index], ends[index]) for index in indices),
                    math.ceil(held),
                    math.floor(usable),
                    math.ceil(held) - math.floor(usable),
                )
            )
    cures = _cures(shape, machines, split, kv_tokens, memories)
    return Shortage(sum(memory.short_bytes for memory in memories), tuple(memories), cures)


def _cures(
    shape: ModelShape,
    machines: Sequence[MachineReport],
    split: tuple[int, ...] | None,
    kv_tokens: int,
    memories: Sequence[ShortMemory],
) -> tuple[Cure, ...]:
    def fits(
        machines: Sequence[MachineReport] = machines, kv_tokens: int = kv_tokens, shape: ModelShape = shape
    ) -> bool:
        problem = cut_problem(shape, machines, kv_tokens)
        if split is not None and len(split) == len(machines):
            ends = [int(end) for end in np.cumsum(split)]
            return cut_fits(problem, ends)
        return some_cut_fits(problem)

    cures = [_free_memory(memories)]
    if split is not None and some_cut_fits(cut_problem(shape, machines, kv_tokens)):
        cures.append(Cure("no_split", "Leave the split out: cut by the planner, it fits."))
    lighter = [_with_fewer_bits(machine) for machine in machines]
    if lighter != list(machines) and fits(machines=lighter):
        changed = [one for one, other in zip(machines, lighter, strict=True) if one.dtype != other.dtype]
        dtypes = sorted({FEWER_BITS[machine.device] for machine in changed})
        names = ", ".join(dict.fromkeys(machine.machine for machine in changed))
        cures.append(Cure("fewer_bits", f"Fewer bits: NOODLE_DTYPE={' or '.join(dtypes)} on {names}."))
    tokens = _most(lambda count: fits(kv_tokens=count), kv_tokens)
    if tokens >= SMALLEST_USEFUL_TOKENS:
        cures.append(
            Cure("shorter_context", f"A shorter context: NOODLE_CONTEXT_LENGTH={tokens} or less fits.", tokens)
        )
    if split is None and len(machines) < shape.layer_count:
        cures += _another_machine(machines, fits)
    stored_bytes = sum(shape.layer_bytes) + shape.embedding_bytes + shape.head_bytes
    thousandths = _most(lambda count: fits(shape=_scaled(shape, count / 1000)), 1000)
    if thousandths:
        most_bytes = stored_bytes * thousandths // 1000
        cures.append(
            Cure(
                "smaller_model",
                f"A smaller model: of this shape, weight files of at most {_size(most_bytes)} fit "
                f"({_size(stored_bytes)} now).",
                most_bytes,
            )
        )
    return tuple(cures)


def _free_memory(memories: Sequence[ShortMemory]) -> Cure:
    # more than is short, since not all of what is free is used
    wanted = {memory.machine: math.ceil(memory.short_bytes / USABLE_SHARE) for memory in memories}
    named = " and ".join(f"{_size(count)} on {machine}" for machine, count in wanted.items())
    return Cure("free_memory", f"More memory, or less of it in use: {named}.", sum(wanted.values()))


def _with_fewer_bits(machine: MachineReport) -> MachineReport:
    if machine.dtype != "float32" or machine.weights not in ("", "f32"):
        return machine
    return msgspec.structs.replace(
        machine, dtype=FEWER_BITS[machine.device], weights="", kv_dtype="", layer_weight_bytes=0.0
    )


def _another_machine(machines: Sequence[MachineReport], fits: Callable[..., bool]) -> list[Cure]:
    """One more stage behind the others, computing as the last of them does."""
    last = machines[-1]

    def fits_with(free_bytes: int) -> bool:
        more = msgspec.structs.replace(last, stage_id=last.stage_id + 1, machine="one more", free_bytes=free_bytes)
        return fits(machines=[*machines, more])

    if not fits_with(MOST_MACHINE_BYTES):
        return []
    enough = next(1 << bits for bits in itertools.count(20) if fits_with(1 << bits))
    too_few = enough // 2 if enough > 1 << 20 else 0
    while enough - too_few > max(1, enough // 200):
        middle = (enough + too_few) // 2
        enough, too_few = (middle, too_few) if fits_with(middle) else (enough, middle)
    text = f"One more machine with {_size(enough)} of free memory (in {last.dtype})."
    return [Cure("another_machine", text, enough)]


def _scaled(shape: ModelShape, factor: float) -> ModelShape:
    return msgspec.structs.replace(
        shape,
        layer_bytes=tuple(int(count * factor) for count in shape.layer_bytes),
        embedding_bytes=int(shape.embedding_bytes * factor),
        head_bytes=int(shape.head_bytes * factor),
    )


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count from 1 to below `limit` that fits, 0 when none does; fitting gets easier with less."""
    fitting, too_many = 0, limit
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def _size(byte_count: int) -> str:
    return f"{byte_count / 1e9:.2f} GB" if byte_count >= 10_000_000 else f"{byte_count / 1e6:.2f} MB"
