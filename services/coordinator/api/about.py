"""What the coordinator reports about itself: /health and /info."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from flask import Blueprint, Response
from msgspec import UNSET, Meta, Struct, UnsetType

from noodle import __version__
from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_response
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api import generate, openai_types
from services.coordinator.api.auth import Clients
from services.coordinator.api.openapi import READY_ERRORS, Operation
from services.coordinator.coordinator import Coordinator
from services.coordinator.ops.health import health_of


class Health(Struct):
    """Anonymous requests get the first two alone."""

    service: Literal["coordinator"]
    status: Literal["starting", "ready", "failed"]
    version: str | UnsetType = UNSET
    detail: str | UnsetType = UNSET
    progress: float | UnsetType = UNSET
    waiting_for: list[str] | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    plan: int | UnsetType | None = UNSET
    plan_reason: str | UnsetType | None = UNSET
    context_length: int | UnsetType | None = UNSET
    warnings: list[str] | UnsetType = UNSET
    leads: bool | UnsetType = UNSET
    kept_kv_tokens: int | UnsetType = UNSET
    stages: Annotated[
        list[dict[str, Any]] | UnsetType, Meta(description="Each stage's layers by the plan, and what it reports.")
    ] = UNSET


class StageInfo(Struct):
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
        method="get",
        path="/health",
        summary="Whether requests are answered",
        description="Reports the status and what the cluster waits for. Anonymous requests get the status alone.",
        answer=Health,
        other_answers={503: ("The start has failed.", Health)},
    ),
    Operation(
        method="get",
        path="/info",
        summary="The model, the limits and the stages",
        description="Reports what is served, by which stages, and within which limits.",
        answer=Info,
        errors=READY_ERRORS,
    ),
)


def about_routes(config: CoordinatorConfig, coordinator: Coordinator, clients: Clients) -> Blueprint:
    """`/health` answers everyone, `/info` clients."""
    routes = Blueprint("about", __name__)

    @routes.get("/health")
    def health() -> Response:
        status, answer = health_of(coordinator)
        if config.api_keys and clients.find() is None:
            answer = {"service": "coordinator", "status": status}
        return json_response(answer, 503 if status == "failed" else 200)

    @routes.get("/info")
    def info() -> Response:
        clients.require()
        return json_response(info_of(config, coordinator))

    return routes


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
