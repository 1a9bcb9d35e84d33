"""`GET /health` reports what the cluster waits for and which stage computes what; `GET /info` reports the limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from flask import Blueprint, Response
from msgspec import UNSET, Meta, Struct, UnsetType

from noodle import __version__
from noodle.config.settings import CoordinatorConfig
from noodle.model.formats import FORMAT_BY_DTYPE
from noodle.web.service import json_response
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api import generate, openai_types
from services.coordinator.api.auth import Clients
from services.coordinator.api.openapi import READY_ERRORS, Operation
from services.coordinator.coordinator import Coordinator
from services.coordinator.leadership import progress_of, waiting_for, warnings_of


class Health(Struct):
    """Anonymous requests get the first two alone."""

    service: Literal["coordinator"]
    status: Literal["starting", "ready", "failed"]
    version: str | UnsetType = UNSET
    detail: str | UnsetType = UNSET
    progress: float | UnsetType = UNSET
    waiting_for: list[str] | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    model_digest: str | UnsetType | None = UNSET
    plan: int | UnsetType | None = UNSET
    plan_reason: str | UnsetType | None = UNSET
    context_length: int | UnsetType | None = UNSET
    has_chat_template: bool | UnsetType | None = UNSET
    warnings: list[str] | UnsetType = UNSET
    leads: bool | UnsetType = UNSET
    kept_kv_tokens: int | UnsetType = UNSET
    stages: Annotated[
        list[dict[str, Any]] | UnsetType, Meta(description="Each stage's layers by the plan, and what it reports.")
    ] = UNSET


class StageInfo(Struct):
    """One stage of the active plan."""

    stage_id: int
    machine: str
    layers: Annotated[tuple[int, int], Meta(description="The first layer, and the one after the last.")]
    dtype: str


class Info(Struct):
    """Names are text-generation-inference's, if it has one."""

    model_id: str
    model_dtype: str
    vocabulary_size: int
    max_total_tokens: int
    max_input_tokens: int
    max_concurrent_requests: int
    max_waiting_requests: int
    max_requests_per_key: int | None
    max_body_bytes: int
    max_stop_sequences: int
    max_openai_stop_sequences: int
    max_top_n_tokens: int
    step_tokens: int
    version: str
    plan: int
    stages: list[StageInfo]


OPERATIONS = (
    Operation(
        "GET /health",
        summary="Whether requests are answered",
        description="Reports the status and what the cluster waits for. Anonymous requests get the status alone.",
        answer=Health,
        other_answers={503: ("The start has failed.", Health)},
    ),
    Operation(
        "GET /info",
        summary="The model, the limits and the stages",
        description="Reports what is served, by which stages, and within which limits.",
        answer=Info,
        errors=READY_ERRORS,
    ),
)


def health_routes(config: CoordinatorConfig, coordinator: Coordinator, clients: Clients) -> Blueprint:
    """`/health` answers everyone, `/info` clients."""
    routes = Blueprint("health", __name__)

    @routes.get("/health")
    def health() -> Response:
        answer = health_of(coordinator)
        status = 503 if answer.status == "failed" else 200
        if config.api_keys and clients.find() is None:
            answer = Health(answer.service, answer.status)
        return json_response(answer, status)

    @routes.get("/info")
    def info() -> Response:
        clients.require()
        return json_response(info_of(config, coordinator))

    return routes


def health_of(coordinator: Coordinator) -> Health:
    view, leads, loop = coordinator.leadership.view, coordinator.leadership.leads, coordinator.loop.state
    is_up = loop.up and coordinator.loaded is not None
    waits = [] if coordinator.loaded else [coordinator.detail]  # the others wait for the model's files too
    waits += waiting_for(view, leads, loop.detail, loop.up)
    failures = [coordinator.failure, *(state.detail for state in view.stages.values() if state.phase == "failed")]
    if view.planner is not None and view.planner.phase == "failed":
        failures.append(view.planner.detail)
    failure = next(filter(None, failures), "")
    return Health(
        service="coordinator",
        status="ready" if is_up else "failed" if failure else "starting",
        version=__version__,
        detail=failure or ("waiting for " + "; ".join(waits) if waits else "ready"),
        progress=progress_of(view, is_up),
        waiting_for=waits,
        model=coordinator.loaded.served.names[0] if coordinator.loaded else None,
        model_digest=view.plan.model_digest if view.plan else None,
        plan=view.plan.version if view.plan else None,
        plan_reason=view.plan.reason if view.plan else None,
        context_length=loop.plan.context_length if loop.plan else None,
        has_chat_template=coordinator.loaded.tokenizer.has_chat_template if coordinator.loaded else None,
        warnings=[*warnings_of(view), *(coordinator.loaded.tokenizer.chat_notes if coordinator.loaded else ())],
        leads=leads,
        kept_kv_tokens=coordinator.loop.kept_rows,
        stages=stages_of(coordinator),
    )


def stages_of(coordinator: Coordinator) -> list[dict[str, Any]]:
    """One object for each stage: its layers by the plan, and what it reports."""
    view = coordinator.leadership.view
    assigned = {stage.stage_id: stage for stage in view.plan.stages} if view.plan else {}
    last = view.plan.stages[-1] if view.plan and view.plan.stages else None
    lines = []
    for stage_id in sorted(assigned.keys() | view.stages.keys()):
        line: dict[str, Any] = {"stage_id": stage_id}
        if (stage := assigned.get(stage_id)) is not None:
            line |= {
                "machine": stage.machine,
                "url": stage.url,
                "layers": [stage.start_layer, stage.end_layer],
                "dtype": stage.dtype,
                "executor": stage.executor,
                "weights": stage.weights or FORMAT_BY_DTYPE[stage.dtype],
                "kv_dtype": stage.kv_dtype or FORMAT_BY_DTYPE[stage.dtype],
                "hop_dtypes": list(stage.activation_dtypes) if stage is not last else [],
            }
        state = view.stages.get(stage_id)
        line |= {"phase": "silent"} if state is None else {
            "phase": state.phase,
            "detail": state.detail,
            "progress": state.progress,
            "machine": state.machine,
            "device": state.device,
            "device_name": state.device_name,
            "threads": state.threads,
            "choice": state.choice,
            "weight_bytes": state.weight_bytes,
            "kv_bytes_held": state.kv_bytes_held,
            "kv_budget_bytes": state.kv_budget_bytes,
            "kv_bytes_per_token": state.kv_bytes_per_token,
            "sessions": state.sessions,
        }  # fmt: skip
        lines.append(line)
    return lines


def info_of(config: CoordinatorConfig, coordinator: Coordinator) -> Info:
    model, plan = coordinator.ready_model(), coordinator.plan
    return Info(
        model_id=model.served.names[0],
        model_dtype="+".join(sorted({stage.dtype for stage in plan.stages})),
        vocabulary_size=model.served.vocabulary_size,
        max_total_tokens=plan.context_length,
        max_input_tokens=plan.context_length,
        max_concurrent_requests=config.maximum_open_requests,
        max_waiting_requests=config.maximum_waiting_requests,
        max_requests_per_key=config.maximum_requests_per_key or None,
        max_body_bytes=config.maximum_body_bytes,
        max_stop_sequences=generate.MAXIMUM_STOP_STRINGS,
        max_openai_stop_sequences=openai_types.MAXIMUM_STOP_STRINGS,
        max_top_n_tokens=MAXIMUM_TOP_LOGPROBS,
        step_tokens=config.step_tokens,
        version=__version__,
        plan=plan.version,
        stages=[
            StageInfo(stage.stage_id, stage.machine, (stage.start_layer, stage.end_layer), stage.dtype)
            for stage in plan.stages
        ],
    )
