"""Keeps a set of processes running: starts them, restarts dead ones with back-off, and stops them in order.

It runs no thread: its owner waits, and calls `look`.
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

from services.cli.client.run_record import ProcessIdentity, ServicePhase, ServiceRecord, identify
from services.cli.local.processes import Signals, end_group, exit_code_without_reaping, last_lines, start_child
from services.cli.local.run_folder import RunFolder

FIRST_DELAY_SECONDS = 0.2  # from a service's first death to its restart; doubles with each further death
LONGEST_DELAY_SECONDS = 10.0  # from a death to the restart
HEALTHY_SECONDS = 60.0  # after running this long, the next death counts as the first
STOP_GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL; gunicorn gives open requests 10
KILL_SECONDS = 5.0  # from SIGKILL until the kernel has ended a process
LOG_LIMIT_BYTES = 32 << 20  # size of a service's log at which it becomes <name>.log.1
SHOWN_LOG_LINES = 8


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """A process to keep running. Services with a lower `stop_rank` are stopped first, and have ended, before others."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    port: int
    stop_rank: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A service that died, or could not be restarted.

    `exit_code` is minus the signal's number if it was killed, None if it never ran; then `failure` says why.
    """

    name: str
    exit_code: int | None
    log_lines: list[str]
    deaths: int  # of this service, this one included
    delay_seconds: float  # until the restart
    failure: str = ""

    def text(self) -> str:
        """Return what happened, without a full stop."""
        if self.exit_code is None:
            return f"{self.name} could not be started ({self.failure})"
        if self.exit_code < 0:
            number = -self.exit_code
            known = {member.value: member.name for member in signal.Signals}
            return f"{self.name} was ended by {known.get(number, f'signal {number}')}"
        return f"{self.name} ended with exit code {self.exit_code}"


@dataclass(eq=False)
class _Supervised:
    spec: ServiceSpec
    process: subprocess.Popen[bytes] | None = None
    identity: ProcessIdentity | None = None
    started_seconds: float = 0.0
    restart_at_seconds: float | None = None
    delay_seconds: float = FIRST_DELAY_SECONDS
    deaths: int = 0
    last_exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        return self.process is not None and exit_code_without_reaping(self.process) is None

    def record(self) -> ServiceRecord:
        phase: ServicePhase = "stopped"
        if self.process is not None:
            phase = "running"
        elif self.restart_at_seconds is not None:
            phase = "restarting"
        return ServiceRecord(
            name=self.spec.name,
            port=self.spec.port,
            phase=phase,
            process=self.identity,
            restarts=self.deaths,
            last_exit_code=self.last_exit_code,
        )


class Supervisor:
    """The processes of one `noodle up`."""

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._services: list[_Supervised] = []

    def add(self, spec: ServiceSpec) -> None:
        """Start a process and keep it running. Raises OSError if it cannot be started."""
        service = _Supervised(spec)
        self._services.append(service)
        self._start(service)

    def records(self) -> tuple[ServiceRecord, ...]:
        return tuple(service.record() for service in self._services)

    def look(self) -> tuple[list[Ended], list[str]]:
        """Notice deaths since the last look and restart the services that are due: (deaths, names restarted).

        A service that cannot be restarted is among the deaths, and is due again after its delay.
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
        """Return the time until the next restart that is due; infinite if there is none."""
        times = [service.restart_at_seconds for service in self._services if service.restart_at_seconds is not None]
        return max(0.0, min(times) - self._clock()) if times else float("inf")

    def limit_logs(self) -> list[str]:
        """Move each log that is too long aside and empty it; a line written at that moment may be lost.

        Returns the names of services whose old lines could not be kept because the disk is full.
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
            os.truncate(path, 0)  # it is open in append mode, so its writer continues at the new end
        return lost

    def stop(self, signals: Signals) -> list[str]:
        """End all services in the order of their ranks; a further request to stop kills them at once.

        Returns the names of those that were killed.
        """
        requests_before = signals.stop_requests
        killed: list[str] = []
        for service in self._services:
            service.restart_at_seconds = None
        for rank in sorted({service.spec.stop_rank for service in self._services}):
            group = [service for service in self._services if service.spec.stop_rank == rank]
            for service in group:
                if service.process is not None and service.is_alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(service.process.pid, signal.SIGTERM)
            self._wait_for_end(group, signals, STOP_GRACE_SECONDS, lambda: signals.stop_requests > requests_before)
            killed += [service.spec.name for service in group if service.is_alive]
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
        """Note a death and when the restart is due."""
        if exit_code is not None and self._clock() - service.started_seconds >= HEALTHY_SECONDS:
            service.delay_seconds = FIRST_DELAY_SECONDS
        delay_seconds = service.delay_seconds
        service.restart_at_seconds = self._clock() + delay_seconds
        service.delay_seconds = min(2 * delay_seconds, LONGEST_DELAY_SECONDS)
        service.deaths += 1
        service.last_exit_code = exit_code
        return Ended(
            name=service.spec.name,
            exit_code=exit_code,
            log_lines=last_lines(self._folder.log_path(service.spec.name), SHOWN_LOG_LINES),
            deaths=service.deaths,
            delay_seconds=delay_seconds,
            failure=failure,
        )

    def _reap(self, service: _Supervised) -> None:
        if service.process is not None:
            service.process.wait(KILL_SECONDS)
            service.process = None

    def _wait_for_end(
        self, group: list[_Supervised], signals: Signals, timeout_seconds: float, hurry: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        while any(service.is_alive for service in group) and not hurry() and time.monotonic() < deadline:
            signals.wait(deadline - time.monotonic())
