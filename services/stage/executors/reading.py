"""How reading weights is told and prepared, whichever executor computes with them; knows no file and no tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Fetch = Callable[[Collection[str]], None]  # brings tensors, by their keys, that the folder has not


def ignore_progress(_done_bytes: int, _total_bytes: int) -> None:
    """For callers that show nothing."""


def nothing_to_fetch(_keys: Collection[str]) -> None:
    """For a folder in which all tensors are."""


@dataclass
class ReadCounter:
    """Bytes of tensors read from disk so far, told to `progress` with their sum; several threads may add."""

    progress: Progress = ignore_progress
    bytes_read: int = 0
    total_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read_bytes: int) -> None:
        """Count a piece that was read."""
        with self._lock:
            self.bytes_read += read_bytes
            self.progress(self.bytes_read, self.total_bytes)
