"""The coordinator's routes of the user's guide: a forward through one stage, and a plan (docs/adr/0014)."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

from flask import Blueprint, Response, request

from noodle import http_client
from noodle.config.settings import CoordinatorConfig
from noodle.errors import GenerationFailed, NotFound, NotReady, RequestTimedOut
from noodle.web.service import add_success_false, json_body, place_in
from services.coordinator.api.auth import Clients
from services.coordinator.api.openapi import ANY_OBJECT, BODY_ERRORS, READY_ERRORS, Operation
from services.coordinator.coordinator import Coordinator

MAXIMUM_RELAYED_FORWARDS = 8  # in progress at once, each with a body in memory; more get 429
MAXIMUM_RELAYED_PLANS = 4  # the planner computes each for up to seconds
CONNECT_SECONDS = 3.0
FORWARD_ANSWER_SECONDS = 160.0  # longer than a stage takes to give up: 30 s for its turn, 120 s for computing
PLAN_ANSWER_SECONDS = 60.0
FORWARD_BODY_BYTES = 8 << 20
PLAN_BODY_BYTES = 256 << 10
MAXIMUM_RELAYED_BYTES = 64 << 20  # of an answer

# A stage and the planner check these bodies; the document names their fields.
FORWARD_FIELDS = {
    "session_id": {"type": "string"},
    "token_ids": {"type": "array", "description": "For the first stage."},
    "activations": {"type": "array", "description": "For the others: hidden states of each token."},
    "token_index": {"type": "integer", "description": "The position of the first token; absent: the next one."},
    "stage_id": {},
    "logits": {"type": "boolean", "description": "Return the logits of the last token; the last stage alone."},
    "end": {"type": "boolean", "description": "Free the session afterwards."},
}
OPERATIONS = (
    Operation(
        "POST /stage/{stage_id}/forward",
        summary="Compute the layers of one stage",
        description="Sends token ids or activations through the layers of a stage, and returns what comes out.",
        answer={
            "type": "object",
            "properties": {"success": {"const": True}, "output": ANY_OBJECT},
            "required": ["success", "output"],
        },
        errors=(*READY_ERRORS, *BODY_ERRORS, 404, 409, 422, 500, 502, 504),
        error_texts={
            404: "There is no such stage.",
            409: "The session is at another position, or the stage has another plan.",
            422: "The activations are not of the stage's hidden size, or cannot be computed.",
        },
        is_guide=True,
        body={"type": "object", "properties": FORWARD_FIELDS},
    ),
    Operation(
        "POST /plan/generate",
        summary="Compute a plan",
        description="Returns the plan for `available_nodes`, or without a body for the registered machines. The active "
        "plan stays as it is.",
        answer={"type": "object", "properties": {"success": {"const": True}}, "required": ["success", "plan"]},
        errors=(*READY_ERRORS, *BODY_ERRORS, 422, 500, 502, 504),
        error_texts={422: "The model does not fit; the message names the machine and the bytes it lacks."},
        is_guide=True,
        body={"type": ["object", "array"]},
    ),
)


def guide_routes(config: CoordinatorConfig, coordinator: Coordinator, clients: Clients) -> Blueprint:
    """Routes for clients: they require an API key or the cluster token, or without keys this machine's own address."""
    routes = Blueprint("guide", __name__)
    add_success_false(routes)
    # what other services compute must not take every thread here
    forwards = threading.BoundedSemaphore(MAXIMUM_RELAYED_FORWARDS)
    plans = threading.BoundedSemaphore(MAXIMUM_RELAYED_PLANS)

    @routes.post("/stage/<stage_id>/forward")
    def stage_forward(stage_id: str) -> Response:
        clients.require()
        url = f"{_stage_url(coordinator, stage_id)}/forward"
        with place_in(forwards, "Too many forwards are in progress."):
            body = json_body(FORWARD_BODY_BYTES)
            return relay(
                url, body, config.cluster_token, name=f"Stage {stage_id}", answer_seconds=FORWARD_ANSWER_SECONDS
            )

    @routes.post("/plan/generate")
    def plan_generate() -> Response:
        clients.require()
        has_body = request.content_length or "Transfer-Encoding" in request.headers
        body = json_body(PLAN_BODY_BYTES, "List fewer nodes.") if has_body else b""
        url = f"{config.planner_url}/plan/preview"
        with place_in(plans, "Too many plans are in progress."):
            return relay(url, body, config.cluster_token, name="The planner", answer_seconds=PLAN_ANSWER_SECONDS)

    return routes


def _stage_url(coordinator: Coordinator, stage_id: str) -> str:
    """The address of a stage of the newest plan."""
    plan = coordinator.leadership.view.plan
    if plan is None:
        raise NotReady("There is no plan yet, and so no stage.", cure="See /health.", retry_after_seconds=2)
    for stage in plan.stages:
        if str(stage.stage_id) == stage_id:
            return stage.url
    known = ", ".join(str(stage.stage_id) for stage in plan.stages)
    raise NotFound(
        f"There is no stage {stage_id[:40]!r}.", cure=f"Plan {plan.version} has the stages {known}.", param="stage_id"
    )


def relay(url: str, body: bytes, token: str, *, name: str, answer_seconds: float) -> Response:
    """POST JSON with the cluster token and return the answer as it came, errors too; `name` is the service in errors.

    Raises NotReady, RequestTimedOut, and GenerationFailed if the service refuses our token: no client can cure that.
    """
    where = f"{name} at {url.removesuffix(urlsplit(url).path)}"
    try:
        answer = http_client.request(
            "POST",
            url,
            token=token,
            body=body,
            headers={"Content-Type": "application/json"},
            connect_seconds=CONNECT_SECONDS,
            answer_seconds=answer_seconds,
            maximum_bytes=MAXIMUM_RELAYED_BYTES,
        )
    except http_client.AnswerTooLarge as error:
        raise GenerationFailed(f"{where} answered with {error}.") from error
    except TimeoutError as error:
        raise RequestTimedOut(
            f"{where} did not answer in {answer_seconds:.0f} s.", cure="See its /health and log."
        ) from error
    except http_client.HTTP_ERRORS as error:
        raise NotReady(
            f"{where} cannot be reached: {http_client.reason_of(error)}.",
            cure="Check that it runs and that its address and port are reachable from here.",
            retry_after_seconds=2,
        ) from error
    if answer.status == 401:
        raise GenerationFailed(
            f"{where} refuses this coordinator's cluster token.",
            cure="Set the same NOODLE_CLUSTER_TOKEN on every machine.",
        )
    retry_after = answer.headers.get("Retry-After")
    passed = {"Retry-After": retry_after} if retry_after else {}
    return Response(answer.body, answer.status, passed, content_type=answer.headers.get("Content-Type"))
