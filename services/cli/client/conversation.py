"""Talks with a process that computes, in JSON lines both ways; knows lines, processes and time, not what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, TypeVar

import msgspec

from noodle.cluster.measuring import ProcessError
from noodle.errors import GenerationFailed, RequestTimedOut, StartError
from services.cli.local.cluster import python_module
from services.cli.local.processes import Interrupted, Signals, end_group, start_child

LOOK_SECONDS = 1.0  # between two looks at the clock while nothing comes


class Line(Protocol):
    """A struct of which each line is one."""

    @property
    def error(self) -> ProcessError | None:
        """Set in the last line of a process that gave up."""


LineT = TypeVar("LineT", bound=Line)


class Conversation:
    """One process, from `with` to its end; to be used in the main thread (see start_child).

    What the process says beside its lines goes to standard error.
    """

    def __init__(self, module: str, name: str, environment: Mapping[str, str], signals: Signals) -> None:
        self._module, self._name, self._environment, self._signals = module, name, environment, signals
        self._lines: deque[bytes] = deque()
        self._rest = b""

    def __enter__(self) -> Conversation:
        self._process = start_child(
            python_module(self._module),
            self._environment,
            subprocess.PIPE,
            standard_input=subprocess.PIPE,
            errors=None,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end_group(self._process, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def say(self, value: object) -> None:
        """Send one line; a process that has gone is noticed by the next `hear`."""
        assert self._process.stdin is not None  # noqa: S101  # asked for above
        try:
            os.write(self._process.stdin.fileno(), msgspec.json.encode(value) + b"\n")
        except BrokenPipeError:
            return

    def hear(self, line_type: type[LineT], timeout_seconds: float) -> LineT:
        """The next line.

        Raises StartError in the process's words when it gave up, GenerationFailed when it ended without a word,
        RequestTimedOut when none came in time, Interrupted when somebody asked for the end.
        """
        line = msgspec.json.decode(self._next_line(timeout_seconds), type=line_type)
        if line.error is not None:
            raise StartError(line.error.message, cure=line.error.cure)
        return line

    def _next_line(self, timeout_seconds: float) -> bytes:
        output = self._process.stdout
        assert output is not None  # noqa: S101  # asked for above
        deadline = time.monotonic() + timeout_seconds
        while not self._lines:
            if self._signals.stop_requested:
                raise Interrupted
            if not self._signals.wait(LOOK_SECONDS, [output]):
                if time.monotonic() >= deadline:
                    raise RequestTimedOut(
                        f"The {self._name} said nothing for {timeout_seconds:.0f} seconds.",
                        cure="Is this machine busy, or short of memory?",
                    )
                continue
            part = os.read(output.fileno(), 1 << 16)
            if not part:
                raise GenerationFailed(
                    f"The {self._name}'s process ended without a result.",
                    cure="Its last words stand above; without any, the system may have killed it for its memory.",
                )
            *lines, self._rest = (self._rest + part).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft()
