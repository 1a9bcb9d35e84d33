"""Explain why a model does not fit: bytes missing on each machine, and what would make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import msgspec

from noodle.cluster.plan import MachineReport, ModelShape
from services.planner.cut_search import best_cut, boundary, cut_fits, held_bytes, shortage_bytes, some_cut_fits
from services.planner.partition import USABLE_SHARE, cut_problem

FEWER_BITS = {"cpu": "bfloat16", "cuda": "float16", "vulkan": "float16"}  # instead of float32, by device
MINIMUM_CONTEXT_TOKENS = 64  # a shorter context is no cure
MAXIMUM_MACHINE_BYTES = 1 << 50


class ShortMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One memory that would hold too much, with the requested cut or the one that comes closest."""

    machine: str
    device: str
    stage_ids: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]  # [start_layer, end_layer) of each of these stages
    needed_bytes: int
    usable_bytes: int
    short_bytes: int


class Cure(msgspec.Struct, frozen=True):
    """One change that makes the model fit by itself."""

    kind: str  # free_memory, fewer_bits, shorter_context, another_machine, smaller_model, no_split
    text: str
    value: int = 0  # bytes, or tokens


class Shortage(msgspec.Struct, frozen=True):
    """All memories that are too small, and all cures."""

    short_bytes: int  # sum over the memories
    memories: tuple[ShortMemory, ...]
    cures: tuple[Cure, ...]


def explain_shortage(
    shape: ModelShape, machines: Sequence[MachineReport], split: tuple[int, ...] | None, kv_tokens: int
) -> Shortage:
    """Explain a MemoryShort of `partition`; machines in stage order."""
    problem = cut_problem(shape, machines, kv_tokens)
    ends = best_cut(problem, shortage_bytes(problem)) if split is None else list(itertools.accumulate(split))
    assert ends is not None  # noqa: S101  # shortage_bytes makes some cut fit
    starts = [0, *ends[:-1]]
    memories = [
        ShortMemory(
            machine=machines[indices[0]].machine,
            device=machines[indices[0]].device,
            stage_ids=tuple(machines[index].stage_id for index in indices),
            layers=tuple((starts[index], ends[index]) for index in indices),
            needed_bytes=math.ceil(held),
            usable_bytes=math.floor(usable),
            short_bytes=math.ceil(held) - math.floor(usable),
        )
        for indices, held, usable in zip(problem.memories, held_bytes(problem, ends), problem.usable_bytes, strict=True)
        if held > usable
    ]
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
            return cut_fits(problem, list(itertools.accumulate(split)))
        return some_cut_fits(problem)

    # more than is missing, because only USABLE_SHARE of free memory is used
    wanted = {memory.machine: math.ceil(memory.short_bytes / USABLE_SHARE) for memory in memories}
    named = " and ".join(f"{_size(count)} on {machine}" for machine, count in wanted.items())
    cures = [Cure("free_memory", f"More memory, or less of it in use: {named}.", sum(wanted.values()))]
    if split is not None and some_cut_fits(cut_problem(shape, machines, kv_tokens)):
        cures.append(Cure("no_split", "Remove the split: a cut by the planner fits."))
    lighter = [_with_fewer_bits(machine) for machine in machines]
    if lighter != list(machines) and fits(machines=lighter):
        changed = [one for one, other in zip(machines, lighter, strict=True) if one.dtype != other.dtype]
        dtypes = sorted({FEWER_BITS[machine.device] for machine in changed})
        names = ", ".join(dict.fromkeys(machine.machine for machine in changed))
        cures.append(Cure("fewer_bits", f"Fewer bits: NOODLE_DTYPE={' or '.join(dtypes)} on {names}."))
    tokens = boundary(lambda count: fits(kv_tokens=count), 0, kv_tokens)
    if tokens >= MINIMUM_CONTEXT_TOKENS:
        cures.append(Cure("shorter_context", f"A shorter context: NOODLE_CONTEXT_LENGTH={tokens} or less.", tokens))
    if split is None and len(machines) < shape.layer_count:
        cures += _another_machine(machines, fits)
    stored_bytes = sum(shape.layer_bytes) + shape.embedding_bytes + shape.head_bytes
    thousandths = boundary(lambda count: fits(shape=_scaled(shape, count / 1000)), 0, 1000)
    if thousandths:
        fitting_bytes = stored_bytes * thousandths // 1000
        sizes = f"at most {_size(fitting_bytes)} fit (now {_size(stored_bytes)})"
        cures.append(
            Cure("smaller_model", f"A smaller model: with this shape, weight files of {sizes}.", fitting_bytes)
        )
    return tuple(cures)


def _with_fewer_bits(machine: MachineReport) -> MachineReport:
    if machine.dtype != "float32" or machine.weights not in ("", "f32"):
        return machine
    return msgspec.structs.replace(
        machine, dtype=FEWER_BITS[machine.device], weights="", kv_dtype="", layer_weight_bytes=0.0
    )


def _another_machine(machines: Sequence[MachineReport], fits: Callable[..., bool]) -> list[Cure]:
    """One more stage at the end of the pipeline, as fast as the last one."""
    last = machines[-1]

    def fits_with(free_bytes: int) -> bool:
        more = msgspec.structs.replace(last, stage_id=last.stage_id + 1, machine="one more", free_bytes=free_bytes)
        return fits(machines=[*machines, more])

    if not fits_with(MAXIMUM_MACHINE_BYTES):
        return []
    power = next(1 << bits for bits in itertools.count(20) if fits_with(1 << bits))
    enough = boundary(fits_with, power, power // 2 if power > 1 << 20 else 0, step=max(1, power // 400))
    text = f"One more machine with {_size(enough)} of free memory (in {last.dtype})."
    return [Cure("another_machine", text, enough)]


def _scaled(shape: ModelShape, factor: float) -> ModelShape:
    return msgspec.structs.replace(
        shape,
        layer_bytes=tuple(int(count * factor) for count in shape.layer_bytes),
        embedding_bytes=int(shape.embedding_bytes * factor),
        head_bytes=int(shape.head_bytes * factor),
    )


def _size(byte_count: int) -> str:
    return f"{byte_count / 1e9:.2f} GB" if byte_count >= 10_000_000 else f"{byte_count / 1e6:.2f} MB"
