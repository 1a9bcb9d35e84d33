"""Store records as JSON lines in one file and the one before it, bounded in bytes; the oldest records go first."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from noodle.errors import InvalidRequest

log = logging.getLogger(__name__)

READ_BYTES = 64 << 10


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What every line has; records without an id are stored as often as they come."""

    entry_id: str = ""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def encoded(value: Any) -> bytes:
    """Encode what a client sent, or a record of it; raises InvalidRequest if it is nested too deeply to be kept."""
    try:
        return msgspec.json.encode(value)
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply to be kept.") from error


class RecordStore:
    """Appends records and reads them back, newest first; any thread may call it.

    A line is appended by one write and is on the disk when `append` returns. A damaged line, as the last one of a
    crash, counts as absent. When a file reaches `maximum_file_bytes`, it replaces the one before it.
    """

    def __init__(self, path: Path, maximum_file_bytes: int) -> None:
        self._files = (path, path.with_name(path.name + ".1"))  # newest first
        self._maximum_file_bytes = maximum_file_bytes
        self._lock = threading.Lock()
        self._ids: tuple[set[str], set[str]] | None = None  # in each file; None until they are read
        self._has_logged_damage = False

    def append(self, records: Sequence[Record]) -> int:
        """Store the records whose ids are in neither file, in order; returns how many. Raises OSError."""
        with self._lock:
            try:
                new = self._new_among(records)
                if new:
                    self._write(new)
            except OSError:
                self._ids = None  # some records may have been written
                raise
        return len(new)

    def newest(self, kind: type[AnyRecord], count: int) -> list[AnyRecord]:
        """At most `count` records, newest first."""
        with self._lock:
            return list(islice(self._records(kind, *self._files), count))

    def find(self, kind: type[AnyRecord], entry_id: str, count: int) -> AnyRecord | None:
        """The record with this id, if it is one of the newest `count`."""
        with self._lock:
            records = islice(self._records(kind, *self._files), count)
            return next((record for record in records if record.entry_id == entry_id), None)

    def _records(self, kind: type[AnyRecord], *paths: Path) -> Iterator[AnyRecord]:
        for path, line in ((each, line) for each in paths for line in _lines_backwards(each)):
            try:
                yield msgspec.json.decode(line, type=kind)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                if not self._has_logged_damage:
                    log.warning("%s has a damaged line, which counts as absent: %s", path, error)
                    self._has_logged_damage = True

    def _new_among(self, records: Sequence[Record]) -> list[Record]:
        """Records that no file has; the first one of those with the same id."""
        if self._ids is None:
            newest, before = ({record.entry_id for record in self._records(Record, path)} for path in self._files)
            self._ids = newest, before
        seen: set[str] = set()
        new = []
        for record in records:
            if record.entry_id and any(record.entry_id in ids for ids in (seen, *self._ids)):
                continue
            seen.add(record.entry_id)
            new.append(record)
        return new

    def _write(self, records: Sequence[Record]) -> None:
        newest, before = self._files
        newest.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = b"".join(encoded(record) + b"\n" for record in records)
        ids, ids_before = self._ids or (set(), set())
        if newest.exists() and newest.stat().st_size + len(lines) > self._maximum_file_bytes:
            newest.replace(before)
            ids, ids_before = set(), ids
        with newest.open("ab") as file:
            if file.tell() and not _ends_with_a_line(newest):
                lines = b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        ids.update(record.entry_id for record in records)
        self._ids = ids, ids_before


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file from its end on, reading only the blocks that are needed."""
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
