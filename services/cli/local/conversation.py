"""A conversation in JSON lines with a process that computes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol, TypeVar

import msgspec

from noodle.cluster.measuring import ProcessError
from noodle.errors import GenerationFailed, RequestTimedOut, StartError
from services.cli.local.processes import Signals, end_group, exit_code_without_reaping, start_child

LOOK_SECONDS = 1.0  # between two looks at the clock while no line comes


class Line(Protocol):
    """A struct that holds one line of a process."""

    @property
    def error(self) -> ProcessError | None:
        """Set in the last line of a process that gave up."""


LineT = TypeVar("LineT", bound=Line)


class ProcessEnded(GenerationFailed):
    """Raised when a process ended without a result."""


@dataclass(eq=False)
class Conversation:
    """One process, from `with` to its end. Use it in the main thread (see start_child).

    What the process prints beside its lines goes to `errors`, or to standard error. At the end it is killed, but not
    before it has had `grace_seconds` to clean up.
    """

    arguments: Sequence[str]
    name: str
    environment: Mapping[str, str]
    signals: Signals
    errors: IO[bytes] | None = None
    grace_seconds: float = 0.0

    def __enter__(self) -> Conversation:
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self.process = start_child(
            self.arguments, self.environment, subprocess.PIPE, standard_input=subprocess.PIPE, errors=self.errors
        )
        return self

    def __exit__(self, *_: object) -> None:
        requests_before = self.signals.stop_requests
        if self.signals.stop_requested:
            end_group(self.process, signal.SIGTERM)
        deadline = time.monotonic() + self.grace_seconds
        while time.monotonic() < deadline and self.signals.stop_requests == requests_before:
            if exit_code_without_reaping(self.process) is not None:
                break
            self.signals.wait(deadline - time.monotonic())  # its end is a signal too
        end_group(self.process, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def send(self, value: object, *, is_last: bool = False) -> None:
        """Send one line. If the process has ended, the next `receive` reports it."""
        standard_input = self.process.stdin
        assert standard_input is not None  # noqa: S101  # start_child was given PIPE
        rest = msgspec.json.encode(value) + b"\n"
        try:
            while rest:  # a signal may cut a write short
                rest = rest[os.write(standard_input.fileno(), rest) :]
        except BrokenPipeError:
            return
        if is_last:
            standard_input.close()

    def receive(self, line_type: type[LineT], timeout_seconds: float = float("inf")) -> LineT:
        """Return the next line.

        Raises StartError in the process's words if it gave up, ProcessEnded if it ended without a line,
        RequestTimedOut if none came in time, Interrupted if a stop was requested.
        """
        line = msgspec.json.decode(self._next_line(timeout_seconds), type=line_type)
        if line.error is not None:
            raise StartError(line.error.message, cure=line.error.cure)
        return line

    def _next_line(self, timeout_seconds: float) -> bytes:
        output = self.process.stdout
        assert output is not None  # noqa: S101  # start_child was given PIPE
        deadline = time.monotonic() + timeout_seconds
        while not self._lines:
            self.signals.raise_if_stopped()
            if not self.signals.wait(LOOK_SECONDS, [output]):
                if time.monotonic() >= deadline:
                    raise RequestTimedOut(
                        f"The {self.name} sent nothing for {timeout_seconds:.0f} seconds.",
                        cure="Check whether this machine is busy or short of memory.",
                    )
                continue
            part = os.read(output.fileno(), 1 << 16)
            if not part:
                raise ProcessEnded(
                    f"The {self.name}'s process ended without a result.",
                    cure="See its last lines above. If there are none, the system may have killed it for its memory.",
                )
            *lines, self._rest = (self._rest + part).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft()
