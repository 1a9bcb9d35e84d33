"""Cut a model's layers over machines: a pure function from measurements to a plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from noodle.cluster.plan import MachineReport, ModelShape, Plan, StageAssignment
from noodle.errors import ConfigurationError, MemoryShort, PlanDoesNotFit
from noodle.model.formats import FORMAT_BY_DTYPE, KV_ITEM_BYTES, STORED, WEIGHT_ITEM_BYTES, WEIGHTS
from services.planner.cut_search import CutProblem, Matrix, best_cut, cut_fits, held_bytes, shortage_bytes
from services.planner.hop_format import Hop, choose_hops
from services.planner.prediction import describe, predict, stage_decode_seconds, stage_work_seconds

# of the free memory a machine reports; the rest is for activations, allocator waste and other programs
USABLE_SHARE = 0.85
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def partition(
    shape: ModelShape,
    machines: Sequence[MachineReport],
    split: tuple[int, ...] | None,
    *,
    kv_tokens: int,
    activation_dtype: str = "auto",
) -> Plan:
    """Plan for `machines`, with version 0; every stage must have room for `kv_tokens` KV rows.

    A `split` (layers per stage) is used unchanged if it adds up and fits. Stages of one machine and device share its
    memory, the smallest free_bytes that any of them reports. `activation_dtype` is a value of NOODLE_HOP_DTYPE. Raises
    PlanDoesNotFit (MemoryShort if memory is the reason), and ConfigurationError for an impossible split.
    """
    ordered = tuple(sorted(machines, key=lambda machine: machine.stage_id))
    _check_machines(shape, ordered)
    problem = cut_problem(shape, ordered, kv_tokens)
    if split is None:
        ends, why = best_cut(problem), "Cut to make the slowest stage as fast as possible"
    else:
        _check_split(split, shape, ordered)
        ends, why = list(itertools.accumulate(split)), f"Cut by {_split_text(split)}"
    if ends is None or not cut_fits(problem, ends):
        raise _does_not_fit(shape, ordered, problem, kv_tokens, ends)
    stages = _assignments(shape, ordered, ends, activation_dtype)
    prediction = predict(stages, {machine.stage_id: machine for machine in ordered})
    return Plan(
        version=0,
        model_digest=shape.digest,
        layer_count=shape.layer_count,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        stages=stages,
        reason=f"{why}: {describe(prediction)}.",
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
                cure="Set NOODLE_MODEL to the same model on every machine, and fetch outdated copies again.",
            )
        if machine.dtype not in DTYPE_BYTES:
            raise PlanDoesNotFit(
                f"{where} computes in {machine.dtype!r}, whose size in memory is unknown.",
                cure=f"Set its NOODLE_DTYPE to one of {', '.join(DTYPE_BYTES)}.",
            )
        if machine.weights and not machine.layer_weight_bytes > 0 and machine.weights not in WEIGHTS:
            raise PlanDoesNotFit(
                f"{where} keeps its weights as {machine.weights!r}, whose size in memory is unknown.",
                cure=f"Set its NOODLE_WEIGHTS to one of {', '.join(WEIGHTS)}.",
            )
        numbers = (machine.decode_layer_seconds, machine.prefill_layer_seconds_per_token)
        may_be_zero = (machine.head_decode_seconds, machine.batched_layer_seconds, machine.batched_head_seconds)
        if not all(math.isfinite(it) and it >= 0 for it in (*numbers, *may_be_zero)) or min(numbers) == 0:
            raise PlanDoesNotFit(
                f"{where} reports impossible layer seconds ({', '.join(map(str, (*numbers, *may_be_zero)))}).",
                cure="Delete the measurements in its NOODLE_CACHE_DIR and start it again.",
            )


def _check_split(split: tuple[int, ...], shape: ModelShape, machines: tuple[MachineReport, ...]) -> None:
    written = _split_text(split)
    if len(split) != len(machines):
        raise ConfigurationError(
            f"{written} is for {len(split)} stages, but there are {len(machines)}.",
            cure="Set one number for each stage, or leave it unset.",
        )
    if min(split) < 1:
        raise ConfigurationError(
            f"{written} gives a stage {min(split)} layers.", cure="Each stage computes at least one layer."
        )
    check_split_sum(split, shape)


def check_split_sum(split: tuple[int, ...], shape: ModelShape) -> None:
    """Raise ConfigurationError unless the split has as many layers as the model."""
    if sum(split) != shape.layer_count:
        raise ConfigurationError(
            f"{_split_text(split)} adds up to {sum(split)} layers, but {shape.name} has {shape.layer_count}.",
            cure=f"Choose numbers that add up to {shape.layer_count}, or leave it unset.",
        )


def _split_text(split: tuple[int, ...]) -> str:
    return f"NOODLE_SPLIT={','.join(map(str, split))}"


def _weight_ratio(shape: ModelShape, machine: MachineReport) -> float:
    """Bytes in memory for each byte in the weight files; measured layer bytes take precedence."""
    stored_bytes = sum(shape.layer_bytes)
    if machine.layer_weight_bytes > 0 and stored_bytes:
        return machine.layer_weight_bytes * shape.layer_count / stored_bytes
    if machine.weights == STORED:
        return 1.0
    return WEIGHT_ITEM_BYTES[machine.weights or FORMAT_BY_DTYPE[machine.dtype]] / shape.stored_item_bytes


def kv_bytes_per_layer(shape: ModelShape, machine: MachineReport | StageAssignment, kv_tokens: int) -> int:
    """Bytes of `kv_tokens` K and V rows in one layer, in the machine's KV format."""
    name = machine.kv_dtype or FORMAT_BY_DTYPE[machine.dtype]
    return round(kv_tokens * shape.kv_items_per_token_per_layer * KV_ITEM_BYTES[name])


def cut_problem(shape: ModelShape, machines: Sequence[MachineReport], kv_tokens: int) -> CutProblem:
    """Seconds and bytes of every slice on every machine, in stage order, and which machines share a memory."""
    count = shape.layer_count
    prefix_bytes = np.concatenate([[0], np.cumsum(np.asarray(shape.layer_bytes, dtype=np.float64))])
    layers = np.arange(count + 1)[None, :] - np.arange(count + 1)[:, None]  # [start, end] -> layers between
    seconds: list[Matrix] = []
    memory_bytes: list[Matrix] = []
    groups: dict[tuple[str, str], list[int]] = {}
    is_batched = all(machine.batched_layer_seconds > 0 for machine in machines)  # compare like with like
    for index, machine in enumerate(machines):
        is_last = index == len(machines) - 1
        work = partial(stage_work_seconds, machine, is_last=is_last, is_batched=is_batched)
        by_layers = np.array([work(taken) for taken in range(count + 1)])
        seconds.append(np.where(layers > 0, by_layers[np.maximum(layers, 0)], np.inf))
        weights = prefix_bytes[None, :] - prefix_bytes[:, None]
        weights += (shape.embedding_bytes if index == 0 else 0) + (shape.head_bytes if is_last else 0)
        kv_bytes = kv_bytes_per_layer(shape, machine, kv_tokens)
        memory_bytes.append(weights * _weight_ratio(shape, machine) + layers * kv_bytes)
        groups.setdefault((machine.machine, machine.device), []).append(index)
    memories = tuple(tuple(indices) for indices in groups.values())
    usable = tuple(USABLE_SHARE * min(machines[index].free_bytes for index in indices) for indices in memories)
    return CutProblem(count, tuple(seconds), tuple(memory_bytes), memories, usable)


def _assignments(
    shape: ModelShape, machines: Sequence[MachineReport], ends: Sequence[int], activation_dtype: str
) -> tuple[StageAssignment, ...]:
    counts = np.diff([0, *ends])
    slowest_seconds = max(
        float(machine.prefill_layer_seconds_per_token * count) for machine, count in zip(machines, counts, strict=True)
    )
    hops = choose_hops(
        activation_dtype, machines, hidden_size=shape.hidden_size, slowest_prefill_seconds=slowest_seconds
    )
    hops.append(Hop("", "", 0.0))  # the last stage sends no hidden states
    stages = []
    for index, (machine, start, end) in enumerate(zip(machines, [0, *ends[:-1]], ends, strict=True)):
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
                decode_seconds=stage_decode_seconds(machine, end - start, is_last=index == len(ends) - 1),
                executor=machine.executor,
                weights=machine.weights,
                kv_dtype=machine.kv_dtype,
                activation_dtype=hops[index].dtype,
                prefill_activation_dtype=hops[index].prefill_dtype,
                hop_token_seconds=hops[index].token_seconds,
            )
        )
    return tuple(stages)


def _does_not_fit(
    shape: ModelShape,
    machines: Sequence[MachineReport],
    problem: CutProblem,
    kv_tokens: int,
    ends: Sequence[int] | None,
) -> MemoryShort:
    """The bytes missing: on the tightest memory of the given cut, else the least that every machine must free."""
    if ends is not None:
        held = held_bytes(problem, ends)
        missing = [needed - limit for needed, limit in zip(held, problem.usable_bytes, strict=True)]
        worst = max(range(len(missing)), key=lambda number: missing[number])
        names = ", ".join(str(machines[index].stage_id) for index in problem.memories[worst])
        what = (
            f"This split does not fit: stage {names} needs {math.ceil(held[worst])} bytes "
            f"(weights and KV rows of {kv_tokens} tokens), {math.floor(problem.usable_bytes[worst])} are usable, "
            f"{math.ceil(missing[worst])} bytes short."
        )
        cure = "Give that stage fewer layers, or free memory on its machine."
    else:
        short = shortage_bytes(problem)
        usable = math.floor(sum(problem.usable_bytes))
        each = "on each machine " if len(problem.memories) > 1 else ""
        what = (
            f"{shape.name} with KV rows of {kv_tokens} tokens does not fit into the {usable} usable bytes "
            f"({USABLE_SHARE:.0%} of the free memory of {len(problem.memories)} machines): {each}{short} bytes short."
        )
        cure = (
            "Close other programs, add a stage on another machine, choose a smaller format (NOODLE_WEIGHTS), "
            "or a smaller NOODLE_CONTEXT_LENGTH."
        )
    return MemoryShort(what, cure=cure)
