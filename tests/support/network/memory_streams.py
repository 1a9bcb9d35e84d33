"""WorkQueue's streams in memory, which can be unavailable, full, or lose entries; the contract tests cover it."""

from __future__ import annotations

import threading

from noodle.cluster.valkey import STREAM_BEGIN, STREAM_ENTRIES, STREAM_READ_ENTRIES
from noodle.errors import QueueUnavailable


class MemoryStreams:
    """Any number of named streams; one clock gives the ids."""

    def __init__(self) -> None:
        self._entries: dict[str, list[tuple[int, bytes]]] = {}
        self._number = 0
        self._changed = threading.Condition()
        self.is_away = False
        self.is_full = False

    def append(self, stream: str, entry: bytes) -> None:
        self._answer()
        if self.is_full:
            raise QueueUnavailable("The memory is full.", cure="Give it more memory (maxmemory).")
        with self._changed:
            self._number += 1
            entries = self._entries.setdefault(stream, [])
            entries.append((self._number, entry))
            del entries[:-STREAM_ENTRIES]
            self._changed.notify_all()

    def newest(self, stream: str) -> str:
        self._answer()
        with self._changed:
            entries = self._entries.get(stream)
            return f"{entries[-1][0]}-0" if entries else STREAM_BEGIN

    def read(self, stream: str, after: str, block_seconds: float) -> list[tuple[str, bytes]]:
        seen = int(after.partition("-")[0])

        def newer() -> list[tuple[int, bytes]]:
            return [entry for entry in self._entries.get(stream, []) if entry[0] > seen][:STREAM_READ_ENTRIES]

        with self._changed:
            self._changed.wait_for(lambda: self.is_away or newer(), block_seconds)
            self._answer()
            return [(f"{number}-0", entry) for number, entry in newer()]

    def go_away(self, *, losing_all: bool = False) -> None:
        """Refuse every call until `come_back`."""
        with self._changed:
            self.is_away = True
            if losing_all:
                self._entries.clear()
                self._number = 0
            self._changed.notify_all()

    def come_back(self) -> None:
        """Accept calls again."""
        self.is_away = False

    def _answer(self) -> None:
        if self.is_away:
            raise QueueUnavailable("The memory does not answer.")
