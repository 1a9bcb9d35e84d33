"""Preview a plan without publishing it: for the registered machines, or for a list of machines (docs/adr/0014).

It is cut and predicted like a published plan; every number names its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from noodle.cluster.plan import MachineReport, ModelShape, Plan
from noodle.errors import ConfigurationError, MemoryShort, NoodleError, NotReady, PlanDoesNotFit, Unprocessable
from noodle.model.formats import FORMAT_BY_DTYPE
from noodle.web.service import error_object
from services.planner.cut_search import held_bytes
from services.planner.memory_shortage import explain_shortage
from services.planner.node_list import ListedMachine, PlanRequest, machines_of
from services.planner.partition import cut_problem, kv_bytes_per_layer, partition
from services.planner.planning import PLANNED_KV_TOKENS
from services.planner.prediction import ASSUMED_HOP, faster_format, predict


def preview(
    request: PlanRequest,
    shape: ModelShape,
    registered: Sequence[MachineReport],
    *,
    split: tuple[int, ...] | None = None,
    active: Plan | None = None,
    activation_dtype: str = "auto",
) -> tuple[int, dict[str, Any]]:
    """HTTP status and answer: 200 with the plan, or 422 with the missing bytes and their cures.

    A request without nodes is planned for the `registered` machines, cut by `split` unless it has one of its own.
    Raises RequestError for impossible nodes, NotReady if there are no machines.
    """
    context_length = _context_length(request, shape)
    kv_tokens = min(PLANNED_KV_TOKENS, context_length)
    if request.available_nodes is not None:
        listed = machines_of(request.available_nodes, shape, registered)
        split = request.split
    elif not registered:
        raise NotReady(
            "No stage has measured its machine yet.",
            cure="Wait for the stages, or list machines as available_nodes.",
            retry_after_seconds=2,
        )
    else:
        listed = [ListedMachine(report, memory_source="measured", dtype_source="measured") for report in registered]
        split = request.split or split
    machines = [each.report for each in listed]
    try:
        plan = partition(shape, machines, split, kv_tokens=kv_tokens, activation_dtype=activation_dtype)
    except MemoryShort as error:
        shortage = explain_shortage(shape, machines, split, kv_tokens)
        return 422, {"success": False, "error": error_object(_as_refusal(error)), "short": shortage}
    except (PlanDoesNotFit, ConfigurationError) as error:
        raise _as_refusal(error) from error
    return 200, {
        "success": True,
        "plan": {
            "active_version": active.version if active else None,
            "is_active": active is not None and _same_cut(plan, active),
            "model": shape.name,
            "model_digest": shape.digest,
            "layer_count": shape.layer_count,
            "hidden_size": shape.hidden_size,
            "context_length": context_length,
            "kv_tokens": kv_tokens,
            "reason": plan.reason,
            "stages": (stages := _stages(plan, shape, listed, kv_tokens)),
            "prediction": _prediction(plan, machines),
            "faster_format": _faster_format(plan, machines, stages),
        },
    }


def _context_length(request: PlanRequest, shape: ModelShape) -> int:
    asked = request.context_length or shape.context_length
    if asked > shape.context_length:
        raise Unprocessable(
            f"A context of {asked} tokens was asked for; this model is planned with 1 to {shape.context_length}.",
            param="context_length",
        )
    return asked


def _as_refusal(error: NoodleError) -> Unprocessable:
    """A start error as an error of the request."""
    refusal = Unprocessable(error.message, cure=error.cure)
    refusal.code = error.code
    return refusal


def _same_cut(plan: Plan, active: Plan) -> bool:
    def cut(each: Plan) -> list[tuple[Any, ...]]:
        return [
            (stage.machine, stage.url, stage.start_layer, stage.end_layer, stage.dtype, stage.executor, stage.weights)
            for stage in each.stages
        ]

    return plan.model_digest == active.model_digest and cut(plan) == cut(active)


def _stages(plan: Plan, shape: ModelShape, listed: Sequence[ListedMachine], kv_tokens: int) -> list[dict[str, Any]]:
    """One object for each stage, in pipeline order; `sources` names the source of each number.

    Stages of one machine and device share its memory: `memory_left_bytes` is what all of them together leave.
    """
    problem = cut_problem(shape, [each.report for each in listed], kv_tokens)
    held = held_bytes(problem, [stage.end_layer for stage in plan.stages])
    memory_of = {index: number for number, indices in enumerate(problem.memories) for index in indices}
    lines = []
    for index, (stage, each) in enumerate(zip(plan.stages, listed, strict=True)):
        report, memory = each.report, memory_of[index]
        layer_count = stage.end_layer - stage.start_layer
        usable_bytes = math.floor(problem.usable_bytes[memory])
        is_last = index == len(plan.stages) - 1
        lines.append(
            {
                "stage_id": stage.stage_id,
                "node_id": stage.machine,
                "url": stage.url,
                "device_type": report.device,
                "device_name": report.device_name,
                "dtype": stage.dtype,
                "executor": stage.executor,
                "weights": stage.weights or FORMAT_BY_DTYPE[stage.dtype],
                "kv_dtype": stage.kv_dtype or FORMAT_BY_DTYPE[stage.dtype],
                "choice": report.choice,
                "hop_dtype": "" if is_last else " and ".join(stage.activation_dtypes),
                "link_bytes_per_second": report.link_bytes_per_second,
                "start_layer": stage.start_layer,
                "end_layer": stage.end_layer,
                "layer_count": layer_count,
                "weight_bytes": stage.weight_bytes,
                "kv_bytes": layer_count * kv_bytes_per_layer(shape, stage, kv_tokens),
                "free_bytes": report.free_bytes,
                "usable_bytes": usable_bytes,
                "memory_left_bytes": usable_bytes - math.ceil(held[memory]),
                "layer_seconds": report.decode_layer_seconds,
                "head_seconds": report.head_decode_seconds if is_last else 0.0,
                "decode_seconds": stage.decode_seconds,
                "sources": {
                    "weight_bytes": "computed",  # from the model's headers and the dtype
                    "kv_bytes": "computed",
                    "free_bytes": each.memory_source,
                    "dtype": each.dtype_source,
                    **dict.fromkeys(("layer_seconds", "head_seconds", "decode_seconds"), report.source),
                },
            }
        )
    return lines


def _faster_format(
    plan: Plan, machines: Sequence[MachineReport], stages: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    left = {stage["stage_id"]: stage["memory_left_bytes"] for stage in stages}
    found = faster_format(plan.stages, {machine.stage_id: machine for machine in machines}, left)
    return None if found is None else asdict(found)


def _prediction(plan: Plan, machines: Sequence[MachineReport]) -> dict[str, Any]:
    predicted = predict(plan.stages, {machine.stage_id: machine for machine in machines})
    slowest = max(range(len(predicted.stage_seconds)), key=predicted.stage_seconds.__getitem__)
    return {
        "token_seconds": predicted.token_seconds,
        "tokens_per_second": 1 / predicted.token_seconds,
        "steady_token_seconds": predicted.steady_token_seconds,
        "prefill_tokens_per_second": predicted.prefill_tokens_per_second,
        "slowest_stage_id": plan.stages[slowest].stage_id,
        "hops": len(plan.stages) + 1,
        "hop_seconds": ASSUMED_HOP.seconds,
        "source": predicted.source,
        "hop_source": ASSUMED_HOP.source,
    }
