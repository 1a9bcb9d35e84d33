"""Metrics that nodes send of themselves, kept as JSON lines in one file and the one before it; bounded in bytes.

Each line is whole or not there: it is appended by one write, and a torn last line of a crash is left behind.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from noodle.errors import InvalidRequest, NotReady

log = logging.getLogger(__name__)

METRICS_FILE_BYTES = 16 << 20  # then it becomes the one before, and a new one begins
MAXIMUM_ENTRIES = 1000  # of one request, and of one answer
MAXIMUM_ENTRY_BYTES = 64 << 10
NODE_FIELDS = ("node_id", "node", "machine", "worker_id")  # the first of them that is there names the node
UNKNOWN_NODE = "unknown"
READ_BYTES = 64 << 10

JsonObject = dict[str, Any]


class MetricsEntry(msgspec.Struct, frozen=True):
    """One line: when it came by this machine's clock, from which node, and what that sent."""

    received_at_seconds: float
    node_id: str
    metrics: JsonObject


def parse_metrics(body: bytes) -> list[tuple[str, JsonObject]]:
    """(node, what it sent) of one object or a list of them; raises InvalidRequest for anything else.

    The numbers may be the object's own fields or stand in its `metrics`; they are kept as they came.
    """
    try:
        value = msgspec.json.decode(body)
    except (RecursionError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise InvalidRequest(
            f"The body is not JSON: {str(error)[:200]}.", cure="Send one object, or a list."
        ) from error
    entries = value if isinstance(value, list) else [value]
    if not 1 <= len(entries) <= MAXIMUM_ENTRIES or not all(isinstance(entry, dict) and entry for entry in entries):
        raise InvalidRequest(
            "The body is not an object of metrics, nor a list of them.",
            cure=f'Send {{"node_id": "...", "metrics": {{...}}}}, or a list of 1 to {MAXIMUM_ENTRIES} such objects.',
        )
    return [_split(entry) for entry in entries]


def _split(entry: JsonObject) -> tuple[str, JsonObject]:
    fields = dict(entry)
    name_field = next((name for name in NODE_FIELDS if isinstance(fields.get(name), str | int)), None)
    node = str(fields.pop(name_field))[:100] if name_field else UNKNOWN_NODE
    inner = fields.get("metrics")
    if isinstance(inner, dict) and len(fields) == 1:
        fields = inner
    if len(msgspec.json.encode(fields)) > MAXIMUM_ENTRY_BYTES:
        raise InvalidRequest(f"The metrics of node {node!r} are more than {MAXIMUM_ENTRY_BYTES} bytes.")
    return node, fields


class MetricsFile:
    """Appends and reads back; any thread may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = path.with_name(path.name + ".1")
        self._lock = threading.Lock()

    def append(self, entries: Sequence[tuple[str, JsonObject]]) -> int:
        """Keep these, in order; raises NotReady when they can not be written, so that the node keeps them."""
        now = time.time()
        lines = b"".join(msgspec.json.encode(MetricsEntry(now, node, metrics)) + b"\n" for node, metrics in entries)
        try:
            with self._lock:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.exists() and self._path.stat().st_size + len(lines) > METRICS_FILE_BYTES:
                    self._path.replace(self._before)
                with self._path.open("ab") as file:
                    if file.tell() and not self._ends_a_line():
                        lines = b"\n" + lines
                    file.write(lines)
        except OSError as error:
            raise NotReady(
                f"The metrics can not be written to {self._path}: {error.strerror}.",
                cure="Free space, or set NOODLE_METRICS_FILE to another file; keep them and send them again.",
                retry_after_seconds=30,
            ) from error
        return len(entries)

    def last(self, count: int) -> list[MetricsEntry]:
        """The newest `count`, oldest first; lines that are damaged are left out."""
        found: list[MetricsEntry] = []
        with self._lock:
            for path in (self._path, self._before):
                for line in _lines_backwards(path):
                    if len(found) == count:
                        break
                    try:
                        found.append(msgspec.json.decode(line, type=MetricsEntry))
                    except (msgspec.MsgspecError, UnicodeDecodeError):
                        log.debug("a damaged line in %s", path)
        return found[::-1]

    def _ends_a_line(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file from its end on, reading no more than is asked for."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        position, rest = file.seek(0, os.SEEK_END), b""
        while position > 0:
            begin = max(0, position - READ_BYTES)
            file.seek(begin)
            lines = (file.read(position - begin) + rest).split(b"\n")
            position, rest = begin, lines[0]
            yield from (line for line in reversed(lines[1:]) if line)
        if rest:
            yield rest
