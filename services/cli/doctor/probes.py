"""Probes of the services that a machine must reach, and their own reports; links.py judges them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from noodle.errors import NoodleError, RequestTimedOut
from noodle.web.connectivity import CONNECTIVITY_PATH, ConnectionResult, ConnectivityReport, Target, try_targets
from services.cli.client.http_client import error_in, get_json
from services.cli.doctor.context import MachineContext

REACH_SECONDS = 14.0  # all services' reports about which others they reach

Value = TypeVar("Value")


class Job(Generic[Value]):
    """Work in its own thread. `value` waits for it until a given time, and never longer."""

    def __init__(self, what: str, work: Callable[[], Value]) -> None:
        self._what, self._work = what, work
        self._future: Future[Value] = Future()
        threading.Thread(target=self._run, name=what, daemon=True).start()

    def value(self, end: float) -> Value:
        """Return or raise what the work did; raises RequestTimedOut if it has not ended by `end` (monotonic)."""
        if not wait([self._future], max(0.0, end - time.monotonic())).done:
            raise RequestTimedOut(f"{self._what} took too long")
        return self._future.result()

    def _run(self) -> None:
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # noqa: BLE001  # raised where the value is waited for
            self._future.set_exception(error)


class Links(Struct, frozen=True):
    """What the probes found."""

    from_here: tuple[ConnectionResult, ...] = ()
    reports: tuple[ConnectivityReport, ...] = ()  # of services: which others they reach
    unreported: tuple[tuple[str, str], ...] = ()  # services that did not report, and why


def probe_links(context: MachineContext) -> Links:
    """Probe every service that this machine must reach, then ask those that answer for their reports.

    One after the other, so that they do not measure each other's probes. The coordinator comes first, because it knows
    further stages.
    """
    from_here = try_targets(context.targets, context.token, context.valkey_password, threading.Lock())
    end = time.monotonic() + REACH_SECONDS
    reports: list[ConnectivityReport] = []
    unreported: list[tuple[str, str]] = []
    asked: set[str] = set()

    def ask(each: ConnectionResult) -> None:
        asked.add(each.url)
        try:
            job = Job(f"asking {each.name}", partial(_ask_for_report, each.url, context.token))
            reports.append(job.value(end))
        except NoodleError as problem:
            unreported.append((each.name, problem.message))

    for each in from_here:
        if each.name == "coordinator" and each.outcome == "open":
            ask(each)
    if not context.is_alone:  # otherwise stages have names that only containers resolve
        from_here = _with_registered(context, from_here, reports)
    for each in from_here:
        if each.outcome == "open" and each.name != "valkey" and each.url not in asked:
            ask(each)
    return Links(from_here, tuple(reports), tuple(unreported))


def _with_registered(
    context: MachineContext, from_here: tuple[ConnectionResult, ...], reports: Sequence[ConnectivityReport]
) -> tuple[ConnectionResult, ...]:
    """Add the stages that the coordinator knows; the URL that a stage registered replaces the expected one."""
    known = {reached.url for reached in from_here}
    named = [
        Target(reached.name, reached.url, reached.machine, reached.version, reached.model_digest)
        for report in reports
        for reached in report.results
        if reached.name.startswith("stage ") and reached.url not in known
    ]
    found = try_targets(named, context.token, context.valkey_password, threading.Lock())
    elsewhere = {reached.name for reached in found} - context.own_names
    return tuple(each for each in from_here if each.outcome == "open" or each.name not in elsewhere) + found


def _ask_for_report(url: str, token: str) -> ConnectivityReport:
    status, answer = get_json(f"{url}{CONNECTIVITY_PATH}", token, REACH_SECONDS)
    if status != 200:
        raise error_in(answer) or NoodleError(f"{url} answered {status}.")
    try:
        return msgspec.convert(answer, ConnectivityReport)
    except msgspec.ValidationError as problem:
        raise NoodleError(f"{url}{CONNECTIVITY_PATH} answered something else: {problem}.") from problem
