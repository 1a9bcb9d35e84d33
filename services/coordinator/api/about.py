"""What the coordinator says of itself: /health and /info."""

from __future__ import annotations

from flask import Blueprint, Response

from noodle import __version__
from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_response
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api import generate_format, openai_request
from services.coordinator.api.about_schemas import HEALTH, INFO
from services.coordinator.api.auth import Clients
from services.coordinator.api.openapi import READY_ERRORS, Operation
from services.coordinator.api.request_body import JsonObject
from services.coordinator.coordinator import Coordinator
from services.coordinator.ops.health import health_of

OPERATIONS = (
    Operation(
        "get",
        "/health",
        "Whether requests are answered, and what is being waited for; a stranger is told the status alone.",
        HEALTH,
        (),
        other_answers={503: ("The start has failed.", HEALTH)},
    ),
    Operation("get", "/info", "What is served, by whom, and within which limits.", INFO, READY_ERRORS),
)


def about_routes(config: CoordinatorConfig, engine: Coordinator, clients: Clients) -> Blueprint:
    """A bare /health is for everyone."""
    routes = Blueprint("about", __name__)

    @routes.get("/health")
    def health() -> Response:
        status, answer = health_of(engine)
        if config.api_keys and clients.find() is None:
            answer = {"service": "coordinator", "status": status}
        return json_response(answer, 503 if status == "failed" else 200)

    @routes.get("/info")
    def info() -> Response:
        clients.require()
        return json_response(info_of(config, engine))

    return routes


def info_of(config: CoordinatorConfig, engine: Coordinator) -> JsonObject:
    """The model, the limits, and who computes what; names as text-generation-inference has them, where it has any."""
    model, plan = engine.ready_model(), engine.plan
    return {
        "model_id": model.served.names[0],
        "model_dtype": "+".join(sorted({stage.dtype for stage in plan.stages})),
        "vocabulary_size": model.served.vocabulary_size,
        "max_total_tokens": plan.context_length,
        "max_input_tokens": plan.context_length,
        "max_concurrent_requests": config.maximum_open_requests,
        "max_waiting_requests": config.maximum_waiting_requests,
        "max_requests_per_key": config.maximum_requests_per_key or None,
        "max_body_bytes": config.maximum_body_bytes,
        "max_stop_sequences": generate_format.MAXIMUM_STOP_STRINGS,
        "max_openai_stop_sequences": openai_request.MAXIMUM_STOP_STRINGS,
        "max_top_n_tokens": MAXIMUM_TOP_LOGPROBS,
        "step_tokens": config.step_tokens,
        "version": __version__,
        "plan": plan.version,
        "stages": [
            {
                "stage_id": stage.stage_id,
                "machine": stage.machine,
                "layers": [stage.start_layer, stage.end_layer],
                "dtype": stage.dtype,
            }
            for stage in plan.stages
        ],
    }
