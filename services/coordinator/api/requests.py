"""Requests in progress, which their clients look at, resume and end: /v1/requests."""

from __future__ import annotations

from typing import Annotated, Literal

from flask import Blueprint, Response, request
from msgspec import Meta, Struct

from noodle.errors import InvalidRequest
from noodle.web.service import error_object, json_response
from services.coordinator.api.auth import Clients
from services.coordinator.api.generate import TokenEvent, generate_events
from services.coordinator.api.openapi import READY_ERRORS, ErrorObject, Operation
from services.coordinator.api.parameters import MAXIMUM_NEW_TOKENS
from services.coordinator.api.sse import event_stream
from services.coordinator.coordinator import Coordinator
from services.coordinator.engine.request import RequestStream


class RequestStatus(Struct):
    id: str
    status: Literal["running", "finished", "failed"]
    tokens: int
    resume_seconds: float
    error: ErrorObject | None


OPERATIONS = (
    Operation(
        "GET /v1/requests/{name}",
        summary="The state of a request",
        description="Reports how many tokens a request of this key has; `name` is the X-Request-Id of its answer.",
        answer=RequestStatus,
        errors=(*READY_ERRORS, 404),
    ),
    Operation(
        "GET /v1/requests/{name}/events",
        summary="Resume the stream of a request",
        description="Sends the request's tokens as events of /generate_stream, all but the first `after`.",
        errors=(*READY_ERRORS, 400, 404, 429),
        event=TokenEvent,
        query={"after": Annotated[int, Meta(ge=0, le=MAXIMUM_NEW_TOKENS)]},
    ),
    Operation(
        "DELETE /v1/requests/{name}",
        summary="End a request",
        description="Ends a request of this key on every stage.",
        answer=RequestStatus,
        errors=(*READY_ERRORS, 404),
    ),
)


def request_routes(coordinator: Coordinator, clients: Clients) -> Blueprint:
    """A client finds its own requests alone."""
    routes = Blueprint("requests", __name__)

    @routes.get("/v1/requests/<name>")
    def status(name: str) -> Response:
        return json_response(status_of(coordinator.find(clients.require(), name)))

    @routes.get("/v1/requests/<name>/events")
    def events(name: str) -> Response:
        stream = coordinator.find(clients.require(), name)
        after = _after(stream)
        return event_stream(generate_events(coordinator.resume(stream), "", after))

    @routes.delete("/v1/requests/<name>")
    def end(name: str) -> Response:
        stream = coordinator.find(clients.require(), name)
        coordinator.loop.admission.end_early(stream.request_id, "cancelled")
        return json_response(status_of(stream))

    return routes


def status_of(stream: RequestStream) -> RequestStatus:
    asked, failure = stream.request, stream.failure
    ended: Literal["finished", "failed"] = "finished" if failure is None else "failed"
    return RequestStatus(
        id=asked.client_request_id or asked.request_id,
        status=ended if stream.ended_at is not None else "running",
        tokens=stream.token_count,
        resume_seconds=asked.resume_seconds,
        error=ErrorObject(**error_object(failure)) if failure else None,
    )


def _after(stream: RequestStream) -> int:
    """The query's `after`; raises InvalidRequest if it is no position, or one that the request has not reached."""
    text = request.args.get("after", "0")
    if not text.isdecimal() or len(text) > len(str(MAXIMUM_NEW_TOKENS)):
        raise InvalidRequest(f"after is {text[:40]!r}, not a number of tokens.", param="after")
    most = stream.request.max_new_tokens if stream.was_resumed else 0  # tokens after the recorded ones come again
    if int(text) > max(most, count := stream.token_count):
        raise InvalidRequest(f"after is {text}, but the request has {count} tokens so far.", param="after")
    return int(text)
