"""The coordinator's routes of the user's guide: a forward to a stage, a plan to look at (docs/adr/0014)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from flask import Blueprint, Response, request

from noodle.config.settings import CoordinatorConfig
from noodle.errors import NotFound, NotReady, TooManyRequests
from noodle.http_client import Answer
from noodle.web.service import add_success_false, json_body
from services.coordinator.api.relay import relay
from services.coordinator.coordinator import Coordinator

MAXIMUM_RELAYED_FORWARDS = 8  # in progress at once, each with a body in memory; more get 429
MAXIMUM_RELAYED_PLANS = 4  # the planner computes each for up to seconds
FORWARD_ANSWER_SECONDS = 160.0  # a stage gives up before: 30 s for its turn, 120 s for computing
PLAN_ANSWER_SECONDS = 60.0
FORWARD_BODY_BYTES = 8 << 20
PLAN_BODY_BYTES = 256 << 10


def guide_routes(config: CoordinatorConfig, engine: Coordinator, require_client: Callable[[], object]) -> Blueprint:
    """Every one of them wants what /v1 wants: an API key or the cluster token, or a loopback without keys."""
    routes = Blueprint("guide", __name__)
    add_success_false(routes)
    forwards = threading.BoundedSemaphore(MAXIMUM_RELAYED_FORWARDS)
    plans = threading.BoundedSemaphore(MAXIMUM_RELAYED_PLANS)

    @routes.post("/stage/<stage_id>/forward")
    def stage_forward(stage_id: str) -> Response:
        require_client()
        url = _stage_url(engine, stage_id)
        with _place(forwards, "forwards"):
            body = json_body(FORWARD_BODY_BYTES)
            headers = {"Content-Type": "application/json"}
            answer = relay(
                f"Stage {stage_id}",
                url,
                "/forward",
                body,
                headers,
                config.cluster_token,
                answer_seconds=FORWARD_ANSWER_SECONDS,
            )
        return _as_response(answer)

    @routes.post("/plan/generate")
    def plan_generate() -> Response:
        require_client()
        is_asked = request.content_length or "Transfer-Encoding" in request.headers
        body = json_body(PLAN_BODY_BYTES, "List fewer nodes.") if is_asked else b""
        headers = {"Content-Type": "application/json"}
        with _place(plans, "plans"):
            answer = relay(
                "The planner",
                config.planner_url,
                "/plan/preview",
                body,
                headers,
                config.cluster_token,
                answer_seconds=PLAN_ANSWER_SECONDS,
            )
        return _as_response(answer)

    return routes


@contextlib.contextmanager
def _place(places: threading.BoundedSemaphore, what: str) -> Iterator[None]:
    """One of the places for what other services compute, or 429: their answers must not take every thread here."""
    if not places.acquire(blocking=False):
        raise TooManyRequests(
            f"As many {what} as may be are in progress.",
            cure="Send the next one when one of them is answered.",
            retry_after_seconds=1,
        )
    try:
        yield
    finally:
        places.release()


def _stage_url(engine: Coordinator, stage_id: str) -> str:
    """Where the newest plan says that this stage is."""
    plan = engine.leadership.view.plan
    if plan is None:
        raise NotReady("There is no plan yet, and so no stage.", cure="See /health.", retry_after_seconds=2)
    for stage in plan.stages:
        if str(stage.stage_id) == stage_id:
            return stage.url
    known = ", ".join(str(stage.stage_id) for stage in plan.stages)
    raise NotFound(
        f"There is no stage {stage_id[:40]!r}.", cure=f"Plan {plan.version} has the stages {known}.", param="stage_id"
    )


def _as_response(answer: Answer) -> Response:
    """The other service's answer as it came, errors too; none of its other headers."""
    retry_after = answer.headers.get("Retry-After")
    headers = {"Retry-After": retry_after} if retry_after else {}
    return Response(answer.body, answer.status, headers, content_type=answer.headers.get("Content-Type"))
