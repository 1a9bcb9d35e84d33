"""Keeps a set of processes running: starts them, starts a dead one again with back-off, stops them in order.

Knows processes, their logs and their order, not what they do. One thread: its owner waits and calls `look`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.cli.local.processes import (
    ProcessIdentity,
    Signals,
    end_group,
    exit_code_without_reaping,
    identify,
    last_lines,
    start_child,
)
from services.cli.local.run_state import RunFolder, ServicePhase, ServiceRecord

FIRST_DELAY_SECONDS = 0.2  # before a service that died is started again; doubles with each death
LONGEST_DELAY_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # after running this long, the next death counts as the first
STOP_GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL; gunicorn itself gives open requests 10
KILL_SECONDS = 5.0  # from SIGKILL until the kernel has ended a process
LOG_LIMIT_BYTES = 32 << 20  # of one service's log; then it becomes <name>.log.1
SHOWN_LOG_LINES = 8


@dataclass(frozen=True)
class ServiceSpec:
    """A process to keep running. Services with a lower `stop_rank` are stopped, and have ended, before the higher."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    port: int
    stop_rank: int


@dataclass(frozen=True)
class Ended:
    """A service that died by itself, or could not be started again.

    `exit_code` is minus the signal's number when it was killed, None when it never ran; then `failure` says why.
    """

    name: str
    exit_code: int | None
    log_lines: list[str]
    deaths: int  # of this service since the start, this one counted
    delay_seconds: float
    failure: str = ""

    def text(self) -> str:
        """What happened, in one sentence."""
        if self.exit_code is None:
            return f"{self.name} could not be started ({self.failure})"
        if self.exit_code < 0:
            number = -self.exit_code
            known = {member.value: member.name for member in signal.Signals}
            return f"{self.name} was ended by {known.get(number, f'signal {number}')}"
        return f"{self.name} ended with exit code {self.exit_code}"


class _Supervised:
    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.process: subprocess.Popen[bytes] | None = None
        self.identity: ProcessIdentity | None = None
        self.started_seconds = 0.0
        self.restart_at_seconds: float | None = None
        self.delay_seconds = FIRST_DELAY_SECONDS
        self.deaths = 0
        self.last_exit_code: int | None = None

    def record(self) -> ServiceRecord:
        phase: ServicePhase = "stopped"
        if self.process is not None:
            phase = "running"
        elif self.restart_at_seconds is not None:
            phase = "restarting"
        return ServiceRecord(self.spec.name, self.spec.port, phase, self.identity, self.deaths, self.last_exit_code)


class Supervisor:
    """The processes of one `noodle up`."""

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._services: list[_Supervised] = []

    def add(self, spec: ServiceSpec) -> None:
        """Start a process and keep it running from now on; raises OSError when it can not be started."""
        service = _Supervised(spec)
        self._services.append(service)
        self._start(service)

    def records(self) -> tuple[ServiceRecord, ...]:
        """Every service as it is now."""
        return tuple(service.record() for service in self._services)

    def look(self) -> tuple[list[Ended], list[str]]:
        """Notice who died since the last look and start again whose time has come: (the dead, the started).

        One that can not be started again is among the dead, and its next try has its time.
        """
        ended = [end for service in self._services if (end := self._notice_end(service)) is not None]
        started = []
        for service in self._services:
            if service.restart_at_seconds is not None and service.restart_at_seconds <= self._clock():
                try:
                    self._start(service)
                    started.append(service.spec.name)
                except OSError as error:
                    ended.append(self._count_end(service, None, error.strerror or str(error)))
        return ended, started

    def seconds_until_restart(self) -> float:
        """How long until the next start that is due; infinite when none is."""
        times = [service.restart_at_seconds for service in self._services if service.restart_at_seconds is not None]
        return max(0.0, min(times) - self._clock()) if times else float("inf")

    def limit_logs(self) -> list[str]:
        """Move a log that has become too long aside and go on in an empty one; a line in that moment may be lost.

        Returns the names of services whose old lines could not be kept: the disk is full, and a log must not be why.
        """
        lost: list[str] = []
        for service in self._services:
            path = self._folder.log_path(service.spec.name)
            if not path.exists() or path.stat().st_size <= LOG_LIMIT_BYTES:
                continue
            aside = path.with_name(f"{path.name}.1")
            try:
                shutil.copyfile(path, aside)
            except OSError:
                aside.unlink(missing_ok=True)
                lost.append(service.spec.name)
            os.truncate(path, 0)  # it is written in append mode, so the writer goes on at the new end
        return lost

    def stop(self, signals: Signals) -> list[str]:
        """End all services in the order of their ranks; a further request to stop ends them at once.

        Returns the names of those that had to be killed.
        """
        requests_before = signals.stop_requests
        killed: list[str] = []
        for service in self._services:
            service.restart_at_seconds = None
        for rank in sorted({service.spec.stop_rank for service in self._services}):
            group = [service for service in self._services if service.spec.stop_rank == rank]
            for service in group:
                if service.process is not None and exit_code_without_reaping(service.process) is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(service.process.pid, signal.SIGTERM)
            self._wait_for_end(group, signals, STOP_GRACE_SECONDS, lambda: signals.stop_requests > requests_before)
            killed += [service.spec.name for service in group if _lives(service)]
            for service in group:
                if service.process is not None:
                    end_group(service.process, signal.SIGKILL)
            self._wait_for_end(group, signals, KILL_SECONDS, lambda: False)
            for service in group:
                self._reap(service)
        return killed

    def _start(self, service: _Supervised) -> None:
        self._folder.logs_dir.mkdir(mode=0o700, exist_ok=True)
        with self._folder.log_path(service.spec.name).open("ab") as log:
            service.process = start_child(service.spec.arguments, service.spec.environment, log)
        service.identity = identify(service.process.pid)
        service.started_seconds = self._clock()
        service.restart_at_seconds = None

    def _notice_end(self, service: _Supervised) -> Ended | None:
        if service.process is None or (exit_code := exit_code_without_reaping(service.process)) is None:
            return None
        end_group(service.process, signal.SIGKILL)  # workers whose master died would keep its port
        self._reap(service)
        return self._count_end(service, exit_code)

    def _count_end(self, service: _Supervised, exit_code: int | None, failure: str = "") -> Ended:
        """Note a death and when the next start is due."""
        if exit_code is not None and self._clock() - service.started_seconds >= HEALTHY_SECONDS:
            service.delay_seconds = FIRST_DELAY_SECONDS
        delay_seconds = service.delay_seconds
        service.restart_at_seconds = self._clock() + delay_seconds
        service.delay_seconds = min(2 * delay_seconds, LONGEST_DELAY_SECONDS)
        service.deaths += 1
        service.last_exit_code = exit_code
        lines = last_lines(self._folder.log_path(service.spec.name), SHOWN_LOG_LINES)
        return Ended(service.spec.name, exit_code, lines, service.deaths, delay_seconds, failure)

    def _reap(self, service: _Supervised) -> None:
        if service.process is not None:
            service.process.wait(KILL_SECONDS)
            service.process = None

    def _wait_for_end(
        self, group: list[_Supervised], signals: Signals, timeout_seconds: float, hurry: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        while any(_lives(service) for service in group) and not hurry() and time.monotonic() < deadline:
            signals.wait(deadline - time.monotonic())


def _lives(service: _Supervised) -> bool:
    return service.process is not None and exit_code_without_reaping(service.process) is None
