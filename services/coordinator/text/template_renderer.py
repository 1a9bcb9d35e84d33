"""Processes that render one chat template, so that a hostile one takes no thread, memory or time of the coordinator.

A process starts when it is needed, and stays. One that exceeds a bound is ended, and the next render starts another.
"""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noodle.errors import NotReady, RequestTimedOut
from services.coordinator.text.template_worker import (
    LENGTH_BYTES,
    MAXIMUM_MEMORY_BYTES,
    OUT_OF_MEMORY_STATUS,
    RENDER_CPU_SECONDS,
    RENDERED,
)

WORKER_FILE = Path(__file__).with_name("template_worker.py")
RENDER_PROCESSES = 2  # at most, so that one slow render does not hold up the others
RENDER_SECONDS = 20.0  # one render with its transfers; far above its processor time, for machines that are busy
START_SECONDS = 30.0  # Python, jinja and compiling the template: 0.2 s on an idle machine
PLACE_SECONDS = 5.0  # waiting for one of the processes
END_SECONDS = 5.0  # from SIGKILL until the kernel has ended a process
RETRY_SECONDS = 2  # Retry-After
READ_BYTES = 1 << 20
FOREIGN_SIGNALS = (signal.SIGKILL, signal.SIGTERM)  # of persons and of the system, not of a template


class RenderRefused(Exception):
    """The template refuses the messages; the text is its reason."""


class TemplateUnusable(RenderRefused):
    """The template cannot be compiled, exceeds a bound, or makes its process end."""


class _Died(Exception):
    """A process ended without an answer, by none of its bounds; `status` as subprocess has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"exit status {status}")
        self.status = status


class TemplateRenderer:
    """Renders one template; threads may share it. Its processes end with it."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._places: queue.LifoQueue[_Process | None] = queue.LifoQueue()  # so that a running one is taken first
        for _ in range(RENDER_PROCESSES):
            self._places.put(None)
        self.close = weakref.finalize(self, _end_all, self._places)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the prompt. Raises RenderRefused, NotReady or RequestTimedOut."""
        request = json.dumps(variables).encode()
        try:
            return self._render_once(request)
        except _Died:  # not by a bound: something killed it, perhaps while it was idle
            try:
                return self._render_once(request)
            except _Died as died:
                if -died.status in FOREIGN_SIGNALS:
                    raise NotReady(
                        f"The process that renders chat templates was ended twice ({died}).",
                        retry_after_seconds=RETRY_SECONDS,
                    ) from died
                raise TemplateUnusable(f"it ended its process twice ({died})") from died

    def _render_once(self, request: bytes) -> str:
        try:
            process = self._places.get(timeout=PLACE_SECONDS)
        except queue.Empty as error:
            raise NotReady("Other conversations take too long to render.", retry_after_seconds=RETRY_SECONDS) from error
        healthy = None
        try:
            process = process or _Process()
            if not process.is_prepared:
                process.prepare(self._source)
            text = process.ask(request, RENDER_SECONDS)
            healthy = process
        except TemplateUnusable:
            raise
        except RenderRefused:
            healthy = process
            raise
        finally:
            if process is not None and healthy is None:
                process.end()
            self._places.put(healthy)
        return text


class _Process:
    """One process; one thread at a time uses it."""

    def __init__(self) -> None:
        """Raises NotReady."""
        self.is_prepared = False  # it has the template
        self._socket, theirs = socket.socketpair()
        # -P: the folder of the file is no place to import from
        command = [sys.executable, "-P", str(WORKER_FILE)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
        except OSError as error:
            self._socket.close()
            raise NotReady(
                f"The process that renders chat templates cannot start ({error.strerror}).",
                retry_after_seconds=RETRY_SECONDS,
            ) from error

    def prepare(self, source: str) -> None:
        """Compile the template. Raises as `ask`, and TemplateUnusable if it is no jinja."""
        try:
            self.ask(json.dumps(source).encode(), START_SECONDS)
        except TemplateUnusable:
            raise
        except RenderRefused as error:
            raise TemplateUnusable(f"it is not a template that jinja reads: {error}") from error
        self.is_prepared = True

    def ask(self, request: bytes, seconds: float) -> str:
        """Return the text of the answer; after any error but a plain RenderRefused the process must be ended."""
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(len(request).to_bytes(LENGTH_BYTES, "big") + request)
            size = int.from_bytes(self._receive(LENGTH_BYTES, deadline), "big")
            frame = self._receive(size, deadline)
        except TimeoutError as error:
            raise RequestTimedOut(f"Rendering the messages took longer than {seconds:.0f} s.") from error
        except (OSError, EOFError) as error:
            raise self._death() from error
        if frame[:1] != RENDERED:
            raise RenderRefused(frame[1:].decode().rstrip("."))
        return frame[1:].decode()

    def end(self) -> int:
        """End the process, whatever it does. Returns its exit status: a negative one is the signal that ended it."""
        self._socket.close()
        self._process.kill()  # does not change the status of one that is ending
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            block = self._socket.recv(min(size - len(received), READ_BYTES))
            if not block:
                raise EOFError
            received += block
        return bytes(received)

    def _death(self) -> Exception:
        status = self.end()
        if status == -signal.SIGPROF:
            return TemplateUnusable(f"it takes more than {RENDER_CPU_SECONDS:g} s of processor time")
        if status == OUT_OF_MEMORY_STATUS:
            return TemplateUnusable(f"it takes more than {MAXIMUM_MEMORY_BYTES >> 20} MiB of memory")
        return _Died(status)


def _end_all(places: queue.LifoQueue[_Process | None]) -> None:
    """End the processes that are idle."""
    while not places.empty():
        process = places.get_nowait()
        if process is not None:
            process.end()
