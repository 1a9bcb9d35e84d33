"""Keeps the core of the worker awake between two steps of streams that run; knows neither steps nor models.

A stage computes, then waits while the others do. A core that sleeps in that time is slower at what comes next: its
clock and caches, and on a virtual machine its place, are gone (docs/adr/0027). While a next step is likely soon, a
thread of the system's lowest priority spins on it (`kernels/stay_awake.c`): whatever else wants to run runs at once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time

from noodle.metrics.machine import container_use
from services.stage.executors.ggml.kernels import own_library

log = logging.getLogger(__name__)

AWAKE_SECONDS = 0.2  # after a step; where tokens take longer, what sleep costs is nothing beside them


class CoreAwake:
    """For one thread, which says when it waits; does nothing where the library or the priority can not be had."""

    def __init__(self, *, is_wanted: bool = True, awake_seconds: float = AWAKE_SECONDS) -> None:
        self._is_wanted, self._awake_seconds = is_wanted, awake_seconds
        self._until = 0.0
        self._library: ctypes.CDLL | None = None  # until the first step nothing is started

    def computed(self) -> None:
        """A step was computed: the next one of the same streams may come soon."""
        if self._is_wanted:
            self._library = _started_library()
            self._until = time.monotonic() + self._awake_seconds

    def begin(self) -> None:
        """The caller waits from now on, and the core that it is on stays awake for what is left of the time."""
        if self._library is not None:
            left_seconds = self._until - time.monotonic()
            if left_seconds > 0:
                self._library.noodle_awake_begin(ctypes.c_int64(int(left_seconds * 1e9)))

    def end(self) -> None:
        """The caller has something to do."""
        if self._library is not None:
            self._library.noodle_awake_end()


@functools.cache
def _started_library() -> ctypes.CDLL | None:
    """The library with its thread running, one in a process however often it is asked for."""
    limit = container_use().core_limit
    if limit is not None:  # it would be used up by waiting
        log.info("this core may sleep between steps: the container may take the time of %.2f cores", limit)
        return None
    library = own_library(keeps_lock=True)
    if library is None:
        return None
    library.noodle_awake_start.restype = ctypes.c_bool
    if not library.noodle_awake_start():
        log.info("this core may sleep between steps: the system gives no thread its lowest priority")
        return None
    return library
