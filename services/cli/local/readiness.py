"""Waits until every service of a new cluster is ready, showing what each does; knows /health and exit codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from noodle.errors import StartError
from services.cli.client.health import Health, ask_health
from services.cli.client.progress import Progress
from services.cli.local.processes import LOOK_AGAIN_SECONDS, Interrupted, Signals
from services.cli.local.supervisor import Ended, ServiceSpec, Supervisor

HEALTH_INTERVAL_SECONDS = 0.25
STALLED_SECONDS = 600.0  # nothing at all changed for so long: it will not become ready
DEATHS_BEFORE_READY = 4  # of one service, then the start is given up
START_REFUSED_EXIT_CODE = 3  # a service that can not start as it is configured; it says why on its last line
QUEUE = "valkey"


def wait_until(
    condition: Callable[[], bool],
    what: str,
    timeout_seconds: float,
    supervisor: Supervisor,
    signals: Signals,
) -> None:
    """Wait for a condition while the services run; raises StartError when one dies or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        for ended in supervisor.look()[0]:
            _refuse_start(ended)
        if signals.stop_requested:
            raise Interrupted
        if time.monotonic() >= deadline:
            raise StartError(f"{what} did not answer for {timeout_seconds:.0f} seconds.", cure="Try again.")
        signals.wait(LOOK_AGAIN_SECONDS)


def wait_until_ready(
    specs: Sequence[ServiceSpec],
    token: str,
    supervisor: Supervisor,
    signals: Signals,
    progress: Progress,
    changed: Callable[[], None],
) -> Health:
    """Wait until the coordinator says ready, and give what it said; `changed` is called when a process came or went.

    Raises StartError with the words of a service that can not start, Interrupted when a stop was asked for.
    """
    try:
        return _wait_until_ready(specs, token, supervisor, signals, progress, changed)
    finally:
        for spec in specs:
            progress.finish(spec.name, "")


def _wait_until_ready(
    specs: Sequence[ServiceSpec],
    token: str,
    supervisor: Supervisor,
    signals: Signals,
    progress: Progress,
    changed: Callable[[], None],
) -> Health:
    last_seen: dict[str, Health] = {}
    changed_seconds = time.monotonic()
    while True:
        ended, started = supervisor.look()
        for end in ended:
            _refuse_start(end)
            tell(end, progress.say)
        if ended or started:
            changed()
        for spec in specs:
            if signals.stop_requested:
                raise Interrupted
            health = ask_health(spec.port, token)
            if health.status == "failed":
                raise StartError(f"{spec.name}: {health.detail or 'failed'}")
            if health != last_seen.get(spec.name):
                last_seen[spec.name] = health
                changed_seconds = time.monotonic()
            if spec.name == "coordinator" and health.status == "ready":
                return health
            _show(spec.name, health, progress)
        if time.monotonic() - changed_seconds > STALLED_SECONDS:
            states = "; ".join(f"{name}: {health.text()}" for name, health in last_seen.items())
            raise StartError(f"Nothing has moved for {STALLED_SECONDS:.0f} seconds ({states}).")
        signals.wait(min(HEALTH_INTERVAL_SECONDS, supervisor.seconds_until_restart()))


def tell(end: Ended, say: Callable[[str], None]) -> None:
    """Say that a service died, what it said last, and when it is started again."""
    say(f"{end.text()}; starting it again in {end.delay_seconds:.1f} s. It said last:")
    for line in end.log_lines:
        say(f"    {line}")


def are_ready(specs: Sequence[ServiceSpec], supervisor: Supervisor, token: str) -> bool:
    """Whether every service runs and says ready."""
    all_run = all(record.phase == "running" for record in supervisor.records())
    return all_run and all(ask_health(spec.port, token).status == "ready" for spec in specs)


def _show(name: str, health: Health, progress: Progress) -> None:
    if health.status == "silent":
        progress.show(name, f"{name}: starting")
    elif health.status == "ready":
        progress.finish(name, "")
    else:
        progress.show(name, f"{name}: {health.text()}", health.progress)


def _refuse_start(end: Ended) -> None:
    """Raise StartError when a service will not start however often it is tried."""
    if end.exit_code == START_REFUSED_EXIT_CODE and end.deaths == 1:
        service = end.name.partition("-")[0]
        reasons = [line for line in end.log_lines if line.startswith(f"noodle {service}: ")]
        if reasons:
            raise StartError(f"{end.name}: {reasons[-1].partition(': ')[2]}")
    if end.name == QUEUE or end.deaths >= DEATHS_BEFORE_READY:
        said = "\n".join(end.log_lines)
        raise StartError(f"{end.text()} before everything was ready. It said last:\n{said}")
