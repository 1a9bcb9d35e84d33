"""Tries the services that a machine must reach, and asks them whom they reach; doctor_links.py judges."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec import Struct

from noodle.errors import NoodleError
from noodle.web.connectivity import (
    CONNECTIVITY_PATH,
    ConnectionResult,
    ConnectivityReport,
    Target,
    try_targets,
)
from services.cli.client.http_client import error_in, get_json
from services.cli.doctor.jobs import Job
from services.cli.doctor.situation import Situation

REACH_SECONDS = 14.0  # the services' answers about whom they reach


class Links(Struct, frozen=True):
    """What trying others brought."""

    from_here: tuple[ConnectionResult, ...] = ()
    reports: tuple[ConnectivityReport, ...] = ()  # of services: whom they reach
    unreported: tuple[tuple[str, str], ...] = ()  # services that were asked and did not say, and why


def try_links(situation: Situation) -> Links:
    """Try every service that this machine must reach, then ask those that answer whom they reach.

    One after the other: what they time must not be one another. The coordinator comes first, it knows of more stages.
    """
    from_here = _tried(situation, situation.targets)
    end = time.monotonic() + REACH_SECONDS
    reports: list[ConnectivityReport] = []
    unreported: list[tuple[str, str]] = []
    asked: set[str] = set()

    def ask(each: ConnectionResult) -> None:
        asked.add(each.url)
        try:
            job = Job(f"asking {each.name}", partial(_ask_connectivity, each.url, situation.token))
            reports.append(job.value(end))
        except NoodleError as problem:
            unreported.append((each.name, problem.message))

    for each in from_here:
        if each.name == "coordinator" and each.outcome == "open":
            ask(each)
    if not situation.is_alone:  # else stages are known by names that only containers know
        from_here = _with_registered(situation, from_here, reports)
    for each in from_here:
        if each.outcome == "open" and each.name != "valkey" and each.url not in asked:
            ask(each)
    return Links(from_here, tuple(reports), tuple(unreported))


def _with_registered(
    situation: Situation, from_here: tuple[ConnectionResult, ...], reports: Sequence[ConnectivityReport]
) -> tuple[ConnectionResult, ...]:
    """Also the stages that the coordinator knows; where one says that it is counts for more than what was expected."""
    known = {reached.url for reached in from_here}
    named = [
        Target(reached.name, reached.url, reached.machine, reached.version, reached.model_digest)
        for report in reports
        for reached in report.results
        if reached.name.startswith("stage ") and reached.url not in known
    ]
    found = _tried(situation, named)
    elsewhere = {reached.name for reached in found} - situation.own_names
    return tuple(each for each in from_here if each.outcome == "open" or each.name not in elsewhere) + found


def _tried(situation: Situation, targets: Sequence[Target]) -> tuple[ConnectionResult, ...]:
    return try_targets(targets, situation.token, situation.valkey_password, threading.Lock())


def _ask_connectivity(url: str, token: str) -> ConnectivityReport:
    """A service's own report; raises NoodleError."""
    status, answer = get_json(f"{url}{CONNECTIVITY_PATH}", token, REACH_SECONDS)
    if status != 200:
        raise error_in(answer) or NoodleError(f"{url} answered {status}.")
    try:
        return msgspec.convert(answer, ConnectivityReport)
    except msgspec.ValidationError as problem:
        raise NoodleError(f"{url}{CONNECTIVITY_PATH} answered something else: {problem}.") from problem
