"""A lock between the processes that prepare the same model."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from noodle.cluster.measuring import StoreProgress
from noodle.folders import writing
from services.coordinator.models.progress import ReportProgress

CACHE_VARIABLE = "NOODLE_CACHE_DIR"


@contextlib.contextmanager
def locked(path: Path, progress: ReportProgress) -> Iterator[None]:
    """Hold the lock file; the kernel releases it when a process dies."""
    with writing(path, CACHE_VARIABLE):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(StoreProgress("wait", "another process prepares the same model"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
