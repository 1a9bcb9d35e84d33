"""What this stage measured of itself and the coordinator has not taken yet: one bounded file, oldest first.

Each line is whole or not there, as in the coordinator's own file. What can not be written is kept in memory, within the
same bound, and written when it can be. Knows no network.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

UNSENT_BYTES = 4 << 20  # about two days of snapshots; then the oldest go
ROOM_MADE = 0.25  # of the bound at once, so that the file is not written anew for each line

JsonObject = dict[str, Any]


class UnsentSnapshots:
    """Used by one thread."""

    def __init__(self, path: Path, maximum_bytes: int = UNSENT_BYTES) -> None:
        self._path, self._maximum_bytes = path, maximum_bytes
        self._lines: deque[bytes] = deque(_whole_lines(path))
        self._bytes = sum(map(len, self._lines))
        self._is_written = False  # whether the file holds exactly these lines: it may end in a torn one
        self._said = False

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, snapshot: JsonObject) -> None:
        """Keep one; the oldest make room where there is none."""
        line = msgspec.json.encode(snapshot) + b"\n"
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes > self._maximum_bytes:
            self._make_room()
        self._write(line if self._is_written else None)

    def oldest(self, maximum_count: int, maximum_bytes: int) -> list[bytes]:
        """The JSON of the oldest ones, at least one of them if there is any."""
        chosen: list[bytes] = []
        size = 0
        for line in self._lines:
            if chosen and (len(chosen) == maximum_count or size + len(line) > maximum_bytes):
                break
            chosen.append(line.rstrip(b"\n"))
            size += len(line)
        return chosen

    def forget(self, count: int) -> None:
        """The oldest `count` have arrived."""
        for _ in range(count):
            self._bytes -= len(self._lines.popleft())
        self._is_written = False
        self._write(None)

    def _make_room(self) -> None:
        before = len(self._lines)
        while len(self._lines) > 1 and self._bytes > self._maximum_bytes * (1 - ROOM_MADE):
            self._bytes -= len(self._lines.popleft())
        self._is_written = False
        log.warning(
            "%d measurements of this stage were not taken by the coordinator and are given up: more than %d bytes wait",
            before - len(self._lines),
            self._maximum_bytes,
        )

    def _write(self, new_line: bytes | None) -> None:
        """Append one line, or write all of them anew; a disk that takes nothing is said once and tried again."""
        try:
            if not self._lines:
                self._path.unlink(missing_ok=True)
            elif new_line is not None:
                self._put(self._path, "ab", [new_line])
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                part = self._path.with_name(self._path.name + ".part")
                self._put(part, "wb", self._lines)
                part.replace(self._path)
            self._is_written, self._said = True, False
        except OSError as error:
            self._is_written = False
            if not self._said:
                log.warning(
                    "what the coordinator has not taken is kept in memory only: %s can not be written (%s). "
                    "Free space, or set NOODLE_STATE_DIR to a folder that can be written.",
                    self._path,
                    error.strerror,
                )
            self._said = True

    def _put(self, path: Path, mode: str, lines: list[bytes] | deque[bytes]) -> None:
        with path.open(mode) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that are JSON objects; a crash may have torn the last one."""
    try:
        data = path.read_bytes()
    except OSError:
        return []  # none is left from before, or it can not be read: the first write says so
    whole: list[bytes] = []
    for line in data.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and isinstance(msgspec.json.decode(line), dict):
                whole.append(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.debug("a damaged line in %s", path)
    return whole
