"""A plan that is only looked at: for the machines that are registered, or for a list of them (docs/adr/0014).

The same partition and prediction as of plans that are followed; every number says where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from noodle.cluster.plan import MachineReport, ModelShape, Plan
from noodle.errors import ConfigurationError, MemoryShort, NoodleError, NotReady, PlanDoesNotFit, Unprocessable
from noodle.model.formats import FORMAT_BY_DTYPE
from noodle.web.service import error_object
from services.planner.cut_search import held_bytes
from services.planner.memory_shortage import shortage
from services.planner.node_list import SPEEDS, Given, PlanRequest, read_nodes
from services.planner.partition import cut_problem, kv_bytes_per_layer, partition
from services.planner.planning import ASSUMED_HOP, PLANNED_KV_TOKENS
from services.planner.prediction import HopCost, predict


def preview(
    request: PlanRequest,
    shape: ModelShape,
    registered: Sequence[MachineReport],
    split: tuple[int, ...] | None,
    active: Plan | None,
    activation_dtype: str = "auto",
    is_exact: bool = False,
) -> tuple[int, dict[str, Any]]:
    """HTTP status and answer: 200 with the plan, or 422 with what is short and what would cure it.

    `registered` are the machines that the planner would plan for, `split` as it would be cut; both count only for a
    request without nodes. Raises RequestError for nodes that mean nothing, NotReady when there are no machines.
    """
    context_length = _context_length(request, shape)
    kv_tokens = min(PLANNED_KV_TOKENS, context_length)
    not_used = request.not_used
    if request.nodes is not None:
        given, more = read_nodes(request.nodes, shape, registered)
        not_used = [*not_used, *more]
        split = request.split
    else:
        if not registered:
            raise NotReady(
                "No stage has measured its machine yet.",
                cure="Wait for the stages, or list machines as available_nodes.",
                retry_after_seconds=2,
            )
        given = [_measured(report) for report in registered]
        split = request.split or split
    machines = [each.report for each in given]
    try:
        plan = partition(
            shape,
            machines,
            split,
            version=0,
            kv_tokens=kv_tokens,
            hop=ASSUMED_HOP,
            activation_dtype=activation_dtype,
            is_exact=is_exact,
        )
    except MemoryShort as error:
        short = shortage(shape, machines, split, kv_tokens)
        return 422, {"success": False, "error": error_object(_as_refusal(error)), "short": short, "not_used": not_used}
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
            "stages": _stages(plan, shape, given, kv_tokens),
            "prediction": _prediction(plan, machines, ASSUMED_HOP),
        },
        "not_used": not_used,
    }


def _context_length(request: PlanRequest, shape: ModelShape) -> int:
    asked = request.context_length
    if asked is None:
        return shape.context_length
    if not 1 <= asked <= shape.context_length:
        raise Unprocessable(
            f"A context of {asked} tokens was asked for; this model is planned with 1 to {shape.context_length}.",
            param="context_length",
        )
    return asked


def _measured(report: MachineReport) -> Given:
    return Given(report, {"free_bytes": "measured", "dtype": "measured", **dict.fromkeys(SPEEDS, report.source)})


def _as_refusal(error: NoodleError) -> Unprocessable:
    """A plan that is not possible is the request's fault here, and does not stop a start."""
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


def _stages(plan: Plan, shape: ModelShape, given: Sequence[Given], kv_tokens: int) -> list[dict[str, Any]]:
    """One object a stage, in pipeline order; `sources` says of each number where it comes from.

    Stages of one machine and device share its memory: `memory_left_bytes` is what all of them leave.
    """
    problem = cut_problem(shape, [each.report for each in given], kv_tokens)
    held = held_bytes(problem, [stage.end_layer for stage in plan.stages])
    memory_of = {index: number for number, indices in enumerate(problem.memories) for index in indices}
    lines = []
    for index, (stage, each) in enumerate(zip(plan.stages, given, strict=True)):
        report, memory = each.report, memory_of[index]
        layer_count = stage.end_layer - stage.start_layer
        usable_bytes = math.floor(problem.usable_bytes[memory])
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
                "quality": stage.quality,
                "choice": report.choice,
                "hop_dtype": " and ".join(stage.may_hand_on) if index < len(plan.stages) - 1 else "",
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
                "head_seconds": report.head_decode_seconds if index == len(plan.stages) - 1 else 0.0,
                "decode_seconds": stage.decode_seconds,
                "sources": {
                    "weight_bytes": "computed",  # from the model's headers and the dtype
                    "kv_bytes": "computed",
                    "free_bytes": each.sources["free_bytes"],
                    "dtype": each.sources["dtype"],
                    "layer_seconds": each.sources["decode_layer_seconds"],
                    "head_seconds": each.sources["head_decode_seconds"],
                    "decode_seconds": each.sources["decode_layer_seconds"],
                },
            }
        )
    return lines


def _prediction(plan: Plan, machines: Sequence[MachineReport], hop: HopCost) -> dict[str, Any]:
    predicted = predict(plan.stages, {machine.stage_id: machine for machine in machines}, hop)
    slowest = max(range(len(predicted.stage_seconds)), key=lambda index: predicted.stage_seconds[index])
    return {
        "token_seconds": predicted.token_seconds,
        "tokens_per_second": 1 / predicted.token_seconds,
        "steady_token_seconds": predicted.steady_token_seconds,
        "prefill_tokens_per_second": predicted.prefill_tokens_per_second,
        "slowest_stage_id": plan.stages[slowest].stage_id,
        "hops": len(plan.stages) + 1,
        "hop_seconds": hop.seconds,
        "source": predicted.source,
        "hop_source": hop.source,
    }
