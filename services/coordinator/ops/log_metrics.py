"""`POST /log_metrics` stores what nodes measure of themselves; `GET /log_metrics` reads the newest entries back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from flask import Blueprint, Response, request
from msgspec import Meta

from noodle.errors import InvalidRequest, NotReady
from noodle.web.service import add_success_false, json_body, json_response
from services.coordinator.api.openapi import BODY_ERRORS, READY_ERRORS, Operation
from services.coordinator.ops.records import Record, RecordStore, encoded

METRICS_FILE_BYTES = 16 << 20  # of each of the two files
METRICS_BODY_BYTES = 1 << 20
MAXIMUM_ENTRIES = 1000  # in one request, and in one answer
MAXIMUM_ENTRY_BYTES = 64 << 10
NODE_FIELDS = ("node_id", "node", "machine", "worker_id")  # the first one present names the node
MAXIMUM_NODE_CHARACTERS = 100
ENTRY_ID_CHARACTERS = 64


MetricsObject = Annotated[dict[str, Any], Meta(min_length=1)]
MetricsBody = MetricsObject | Annotated[list[MetricsObject], Meta(min_length=1, max_length=MAXIMUM_ENTRIES)]


class MetricsEntry(Record, frozen=True, kw_only=True):
    """One entry as it is stored."""

    received_at_seconds: float  # Unix time, by the coordinator's clock
    node_id: str
    metrics: dict[str, Any]


class MetricsStored(msgspec.Struct):
    """The answer to POST /log_metrics."""

    success: bool
    stored: int
    already_stored: int


class MetricsList(msgspec.Struct):
    """The answer to GET /log_metrics."""

    success: bool
    entries: list[MetricsEntry]


GUIDE_ERRORS = (*READY_ERRORS, *BODY_ERRORS, 500, 504)
OPERATIONS = (
    Operation(
        "POST /log_metrics",
        summary="Store metrics of a node",
        description="Stores one object or a list of them; an entry whose `entry_id` is stored already is not stored "
        "again.",
        answer=MetricsStored,
        errors=GUIDE_ERRORS,
        is_guide=True,
        body=MetricsBody,
    ),
    Operation(
        "GET /log_metrics",
        summary="Read the newest metrics",
        description="Returns the newest entries that nodes sent, oldest first.",
        answer=MetricsList,
        errors=GUIDE_ERRORS,
        is_guide=True,
        query={"last": Annotated[int, Meta(ge=1, le=MAXIMUM_ENTRIES, description="How many entries, by default 100.")]},
    ),
)


def log_metrics_routes(path: Path, require_client: Callable[[], object]) -> Blueprint:
    """The routes over the file at `path`; `require_client` raises for anonymous requests."""
    routes = Blueprint("log_metrics", __name__)
    add_success_false(routes)
    store = RecordStore(path, METRICS_FILE_BYTES)

    @routes.post("/log_metrics")
    def log_metrics() -> Response:
        require_client()
        entries = parse_metrics(json_body(METRICS_BODY_BYTES, "Send fewer entries at once."), time.time())
        try:
            stored = store.append(entries)
        except OSError as error:
            raise NotReady(
                f"The metrics cannot be written to {path}: {error.strerror}.",
                cure="Free disk space, or set NOODLE_METRICS_FILE to another file. Keep the entries and send them "
                "again.",
                retry_after_seconds=30,
            ) from error
        return json_response(MetricsStored(True, stored, len(entries) - stored))

    @routes.get("/log_metrics")
    def logged_metrics() -> Response:
        require_client()
        asked = request.args.get("last", "100")
        if not re.fullmatch(r"[0-9]{1,6}", asked) or not 1 <= int(asked) <= MAXIMUM_ENTRIES:
            raise InvalidRequest(f"last is {asked[:40]!r}, not a number from 1 to {MAXIMUM_ENTRIES}.", param="last")
        return json_response(MetricsList(True, store.newest(MetricsEntry, int(asked))[::-1]))

    return routes


def parse_metrics(body: bytes, received_at_seconds: float) -> list[MetricsEntry]:
    """Parse one object or a list of objects; raises InvalidRequest.

    The numbers of an object are its own fields or the fields of its `metrics`; they are stored unchanged.
    """
    try:
        value = msgspec.json.decode(body, type=MetricsBody)
    except (RecursionError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise InvalidRequest(
            f"The body is not JSON metrics: {str(error)[:200]}.",
            cure=f'Send {{"node_id": "...", "metrics": {{...}}}}, or a list of 1 to {MAXIMUM_ENTRIES} such objects.',
        ) from error
    entries = value if isinstance(value, list) else [value]
    return [_parse_entry(entry, received_at_seconds) for entry in entries]


def _parse_entry(entry: dict[str, Any], received_at_seconds: float) -> MetricsEntry:
    fields = dict(entry)
    entry_id = fields.pop("entry_id", "")
    if not isinstance(entry_id, str) or len(entry_id) > ENTRY_ID_CHARACTERS:
        raise InvalidRequest(
            f"An entry_id is not a string of at most {ENTRY_ID_CHARACTERS} characters.", param="entry_id"
        )
    node_field = next((name for name in NODE_FIELDS if isinstance(fields.get(name), str | int)), None)
    node_id = str(fields.pop(node_field))[:MAXIMUM_NODE_CHARACTERS] if node_field else "unknown"
    metrics = fields.get("metrics")
    if not isinstance(metrics, dict) or len(fields) > 1:
        metrics = fields
    if len(encoded(metrics)) > MAXIMUM_ENTRY_BYTES:
        raise InvalidRequest(f"The metrics of node {node_id!r} are larger than {MAXIMUM_ENTRY_BYTES} bytes.")
    return MetricsEntry(entry_id=entry_id, received_at_seconds=received_at_seconds, node_id=node_id, metrics=metrics)
