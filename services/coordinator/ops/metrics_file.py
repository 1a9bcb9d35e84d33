"""Metrics that nodes send of themselves, kept as JSON lines in one file and the one before it; bounded in bytes.

Each line is whole or not there: it is appended by one write, and a torn last line of a crash is left behind. An entry
that has an id and is in one of the files is not kept again, so that a node that heard no answer may send it again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from noodle.errors import InvalidRequest, NotReady

log = logging.getLogger(__name__)

METRICS_FILE_BYTES = 16 << 20  # then it becomes the one before, and a new one begins
MAXIMUM_ENTRIES = 1000  # of one request, and of one answer
MAXIMUM_ENTRY_BYTES = 64 << 10
NODE_FIELDS = ("node_id", "node", "machine", "worker_id")  # the first of them that is there names the node
UNKNOWN_NODE = "unknown"
ENTRY_ID_CHARACTERS = 64
READ_BYTES = 64 << 10

JsonObject = dict[str, Any]


class MetricsEntry(msgspec.Struct, frozen=True):
    """One line: when it came by this machine's clock, from which node, and what that sent."""

    received_at_seconds: float
    node_id: str
    metrics: JsonObject
    entry_id: str = ""


class _OnlyId(msgspec.Struct, frozen=True):
    entry_id: str = ""


class SentEntry(NamedTuple):
    """What a node sent; without an id it is kept as often as it comes."""

    node_id: str
    metrics: JsonObject
    entry_id: str = ""


class Kept(NamedTuple):
    """How many entries were kept now, and how many had been before."""

    stored: int
    already_stored: int


def parse_metrics(body: bytes) -> list[SentEntry]:
    """What one object or a list of them says; raises InvalidRequest for anything else.

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


def _split(entry: JsonObject) -> SentEntry:
    fields = dict(entry)
    entry_id = fields.pop("entry_id", "")
    if not isinstance(entry_id, str) or len(entry_id) > ENTRY_ID_CHARACTERS:
        raise InvalidRequest(f"An entry_id is no text of at most {ENTRY_ID_CHARACTERS} characters.", param="entry_id")
    name_field = next((name for name in NODE_FIELDS if isinstance(fields.get(name), str | int)), None)
    node = str(fields.pop(name_field))[:100] if name_field else UNKNOWN_NODE
    inner = fields.get("metrics")
    if isinstance(inner, dict) and len(fields) == 1:
        fields = inner
    if len(msgspec.json.encode(fields)) > MAXIMUM_ENTRY_BYTES:
        raise InvalidRequest(f"The metrics of node {node!r} are more than {MAXIMUM_ENTRY_BYTES} bytes.")
    return SentEntry(node, fields, entry_id)


class MetricsFile:
    """Appends and reads back; any thread may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = path.with_name(path.name + ".1")
        self._lock = threading.Lock()
        self._ids: dict[Path, set[str]] | None = None  # of what is in each file; None until it is read from them

    def append(self, entries: Sequence[SentEntry]) -> Kept:
        """Keep these on disk, in order; raises NotReady when they can not be written, so that the node keeps them."""
        try:
            with self._lock:
                new = self._not_stored(entries)
                if new:
                    self._write(new)
                return Kept(len(new), len(entries) - len(new))
        except OSError as error:
            self._ids = None  # some of them may have been written
            raise NotReady(
                f"The metrics can not be written to {self._path}: {error.strerror}.",
                cure="Free space, or set NOODLE_METRICS_FILE to another file; keep them and send them again.",
                retry_after_seconds=30,
            ) from error

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

    def _not_stored(self, entries: Sequence[SentEntry]) -> list[SentEntry]:
        """Those that are in none of the files; of one that comes twice the first."""
        if self._ids is None:
            self._ids = {path: set(_ids_in(path)) for path in (self._path, self._before)}
        known = [*self._ids.values(), set[str]()]
        new: list[SentEntry] = []
        for entry in entries:
            if entry.entry_id and any(entry.entry_id in ids for ids in known):
                continue
            known[-1].add(entry.entry_id)
            new.append(entry)
        return new

    def _write(self, entries: Sequence[SentEntry]) -> None:
        """Append lines; when this returns they are on the disk, and their ids are known."""
        now = time.time()
        lines = b"".join(msgspec.json.encode(MetricsEntry(now, *entry)) + b"\n" for entry in entries)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        ids = self._ids or {}
        if self._path.exists() and self._path.stat().st_size + len(lines) > METRICS_FILE_BYTES:
            self._path.replace(self._before)
            ids[self._before] = ids.pop(self._path, set())
        with self._path.open("ab") as file:
            if file.tell() and not self._ends_a_line():
                lines = b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        ids.setdefault(self._path, set()).update(entry.entry_id for entry in entries if entry.entry_id)

    def _ends_a_line(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _ids_in(path: Path) -> Iterator[str]:
    """The ids of the entries in a file; lines that are damaged have none."""
    for line in _lines_backwards(path):
        try:
            entry_id = msgspec.json.decode(line, type=_OnlyId).entry_id
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if entry_id:
            yield entry_id


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
