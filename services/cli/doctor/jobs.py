"""Work that runs beside other work and is waited for until a common end; knows nothing of what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from noodle.errors import NoodleError, RequestTimedOut

Value = TypeVar("Value")


class Job(Generic[Value]):
    """One piece of work in a thread of its own, which nobody waits for longer than until `end`."""

    def __init__(self, what: str, work: Callable[[], Value]) -> None:
        self._what, self._work = what, work
        self._values: list[Value] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=what, daemon=True).start()

    def value(self, end: float) -> Value:
        """What it gave; raises what it raised, and RequestTimedOut when it has not ended by then (monotonic)."""
        if not self._done.wait(max(0.0, end - time.monotonic())):
            raise RequestTimedOut(f"{self._what} took too long")
        if self._error is not None:
            raise self._error
        return self._values[0]

    def value_or(self, end: float, otherwise: Callable[[NoodleError], Value]) -> Value:
        """The same, with what stands for it when it could not be had."""
        try:
            return self.value(end)
        except NoodleError as error:
            return otherwise(error)

    def _run(self) -> None:
        try:
            self._values.append(self._work())
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            self._error = error
        self._done.set()
