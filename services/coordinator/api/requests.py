"""Requests in progress, to be looked at, taken up and ended by whoever made them: /v1/requests."""

from __future__ import annotations

from flask import Blueprint, Response, request

from noodle.errors import InvalidRequest
from noodle.web.service import error_object, json_response
from services.coordinator.api.answering import event_stream
from services.coordinator.api.auth import Clients
from services.coordinator.api.generate_schemas import TOKEN_EVENT
from services.coordinator.api.generate_stream import generate_events
from services.coordinator.api.json_schema import COUNT, NUMBER, STRING, always, integer, nullable, one_of
from services.coordinator.api.openapi import ERROR, READY_ERRORS, Operation
from services.coordinator.api.request_body import JsonObject
from services.coordinator.coordinator import Coordinator
from services.coordinator.engine.parameters import MAXIMUM_NEW_TOKENS
from services.coordinator.engine.request import RequestStream

STATUS = always(
    {
        "id": STRING,
        "status": one_of("running", "finished", "failed"),
        "tokens": COUNT,
        "resume_seconds": NUMBER,
        "error": nullable(ERROR["properties"]["error"]),
    }
)
OPERATIONS = (
    Operation("get", "/v1/requests/{name}", "How far a request of this key is.", STATUS, (*READY_ERRORS, 404)),
    Operation(
        "get",
        "/v1/requests/{name}/events",
        "The request's tokens as server-sent events of /generate_stream, after so many whose text was delivered.",
        None,
        (*READY_ERRORS, 400, 404, 429),
        event=TOKEN_EVENT,
        query={"after": integer(0, MAXIMUM_NEW_TOKENS)},
    ),
    Operation("delete", "/v1/requests/{name}", "End a request on every stage.", STATUS, (*READY_ERRORS, 404)),
)


def request_routes(engine: Coordinator, clients: Clients) -> Blueprint:
    """`name` is the X-Request-Id of the request's answer; another key's requests are not found."""
    routes = Blueprint("requests", __name__)

    @routes.get("/v1/requests/<name>")
    def status(name: str) -> Response:
        return json_response(status_of(engine.find(clients.require(), name)))

    @routes.get("/v1/requests/<name>/events")
    def events(name: str) -> Response:
        stream = engine.find(clients.require(), name)
        after = _after(stream)
        return event_stream(generate_events(engine.take_up(stream), "", after))

    @routes.delete("/v1/requests/<name>")
    def end(name: str) -> Response:
        stream = engine.find(clients.require(), name)
        engine.loop.admission.end_early(stream.request_id, "cancelled")
        return json_response(status_of(stream))

    return routes


def status_of(stream: RequestStream) -> JsonObject:
    """A request as its client sees it."""
    request, failure = stream.request, stream.failure
    ended = "finished" if failure is None else "failed"
    return {
        "id": request.client_request_id or request.request_id,
        "status": ended if stream.has_ended else "running",
        "tokens": stream.token_count,
        "resume_seconds": request.resume_seconds,
        "error": error_object(failure) if failure else None,
    }


def _after(stream: RequestStream) -> int:
    """The query's `after`; raises InvalidRequest for what is no position, or one that is not reached yet."""
    text = request.args.get("after", "0")
    if not text.isdecimal() or len(text) > len(str(MAXIMUM_NEW_TOKENS)):
        raise InvalidRequest(f"after is {text[:40]!r}, not a number of tokens.", param="after")
    most = stream.request.max_new_tokens if stream.was_resumed else 0  # those after what was recorded come again
    if int(text) > max(most, count := stream.token_count):
        raise InvalidRequest(f"after is {text}, but the request has {count} tokens so far.", param="after")
    return int(text)
