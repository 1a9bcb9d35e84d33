"""Waits until every service of a new cluster is ready, and shows what each one does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from noodle.errors import StartError
from services.cli.client.health import Health, ask_health
from services.cli.client.progress import Progress
from services.cli.local.processes import LOOK_AGAIN_SECONDS, Signals
from services.cli.local.supervisor import Ended, ServiceSpec, Supervisor

HEALTH_INTERVAL_SECONDS = 0.25  # between two looks at /health while the services start
STALLED_SECONDS = 600.0  # without any change, after which the start is given up
DEATHS_BEFORE_READY = 4  # of one service, after which the start is given up
START_REFUSED_EXIT_CODE = 3  # of a service that cannot start as configured; its last line says why
QUEUE, PLANNER, COORDINATOR = "valkey", "planner", "coordinator"


@dataclass(frozen=True)
class Start:
    """A start in progress: the processes, the signals that can stop it, and where it is shown."""

    supervisor: Supervisor
    signals: Signals
    progress: Progress

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        """Wait for a condition while the services run; raises StartError if one dies or the time is over."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            for ended in self.supervisor.look()[0]:
                _refuse_start(ended)
            self.signals.raise_if_stopped()
            if time.monotonic() >= deadline:
                raise StartError(f"{what} did not answer for {timeout_seconds:.0f} seconds.", cure="Try again.")
            self.signals.wait(LOOK_AGAIN_SECONDS)

    def wait_until_ready(self, specs: Sequence[ServiceSpec], token: str, on_change: Callable[[], None]) -> Health:
        """Wait until the coordinator is ready and return its health; call `on_change` when a process came or went.

        Raises StartError in the words of a service that cannot start, Interrupted if a stop was requested.
        """
        last_seen: dict[str, Health] = {}
        changed_seconds = time.monotonic()
        try:
            while True:
                ended, started = self.supervisor.look()
                for end in ended:
                    _refuse_start(end)
                    log_death(end, self.progress.log)
                if ended or started:
                    on_change()
                for spec in specs:
                    self.signals.raise_if_stopped()
                    health = ask_health(spec.port, token)
                    if health.status == "failed":
                        raise StartError(f"{spec.name}: {health.detail or 'failed'}")
                    if health != last_seen.get(spec.name):
                        last_seen[spec.name] = health
                        changed_seconds = time.monotonic()
                    if spec.name == COORDINATOR and health.status == "ready":
                        return health
                self._show(last_seen)
                if time.monotonic() - changed_seconds > STALLED_SECONDS:
                    states = "; ".join(f"{name}: {health.text()}" for name, health in last_seen.items())
                    raise StartError(f"Nothing has changed for {STALLED_SECONDS:.0f} seconds ({states}).")
                self.signals.wait(min(HEALTH_INTERVAL_SECONDS, self.supervisor.seconds_until_restart()))
        finally:
            for spec in specs:
                self.progress.finish(spec.name)

    def _show(self, seen: Mapping[str, Health]) -> None:
        shown = shown_services(seen)
        for name in seen.keys() - shown:
            self.progress.finish(name)
        for name in shown:
            health, text = seen[name], seen[name].text()
            is_starting = health.status == "silent"
            # the coordinator's share is the whole start's, and it is shown last: only what it waits for says something
            fraction = None if is_starting or name == COORDINATOR else health.progress
            self.progress.show(name, f"{name}: {'starting' if is_starting else text}", fraction)


def shown_services(seen: Mapping[str, Health]) -> list[str]:
    """Return the services whose row says what no other one says.

    The planner waits for the stages, and the coordinator for both: each is shown once those before it do nothing.
    """
    late = {name: health for name, health in seen.items() if health.status != "ready"}
    stages = [name for name in late if name not in (PLANNER, COORDINATOR)]
    if any(late[name].status != "waiting" for name in stages):
        return stages
    return stages + [name for name in (PLANNER, COORDINATOR) if name in late][:1]


def log_death(end: Ended, log: Callable[[str], None]) -> None:
    """Log that a service died, its last lines, and when it is restarted."""
    log(f"{end.text()}; restarting it in {end.delay_seconds:.1f} s. Its last lines:")
    for line in end.log_lines:
        log(f"    {line}")


def are_ready(specs: Sequence[ServiceSpec], supervisor: Supervisor, token: str) -> bool:
    """Return whether every service runs and answers that it is ready."""
    all_run = all(record.phase == "running" for record in supervisor.records())
    return all_run and all(ask_health(spec.port, token).status == "ready" for spec in specs)


def _refuse_start(end: Ended) -> None:
    """Raise StartError if restarting a service would not help."""
    if end.exit_code == START_REFUSED_EXIT_CODE and end.deaths == 1:
        service = end.name.partition("-")[0]
        reasons = [line for line in end.log_lines if line.startswith(f"noodle {service}: ")]
        if reasons:
            raise StartError(f"{end.name}: {reasons[-1].partition(': ')[2]}")
    if end.name == QUEUE or end.deaths >= DEATHS_BEFORE_READY:
        lines = "\n".join(end.log_lines)
        raise StartError(f"{end.text()} before everything was ready. Its last lines:\n{lines}")
