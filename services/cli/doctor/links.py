"""What `noodle doctor` makes of tries to reach services: closed, dropped, locked, slow, of another version; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from noodle.config.addresses import host_of
from noodle.web.connectivity import ConnectionResult, ConnectivityReport
from services.cli.doctor.addresses import LOOK_UP
from services.cli.doctor.outcome import Outcome, error, ok, skipped, warning
from services.cli.project.programs import System

# A wired home network makes trips of 0.3 to 1 ms and 110 MB/s; Wi-Fi 2 to 10 ms and 3 to 40 MB/s.
SLOW_ROUND_TRIP_SECONDS = 0.002
SLOW_BYTES_PER_SECOND = 30e6
CLOCK_SECONDS = 5.0  # more than HTTP's whole seconds and a slow answer make

JOIN_CURE = (
    "on machine A: docker compose run --rm init   (prints B's join line again)\n"
    "on machine B: delete secrets/, docker compose run --rm init --machine b --join ..., docker compose up -d"
)
FIREWALL_CURE = (
    "ping {host}   (is it on, and on this network?)\n"
    "on that machine: sudo deploy/firewall.sh --apply   (Linux), or deploy\\firewall.ps1 -Apply   (Windows)"
)
WHY = {
    "coordinator": "requests, weights and the way back go through it",
    "planner": "it makes the plan",
    "valkey": "stages register in it; without it there is no plan",
}
WHY_STAGE = "hidden states travel from stage to stage by this port"


class Here(Struct, frozen=True):
    """The one who looks."""

    machine: str
    system: System
    version: str
    host: str  # its own address; what has another one is on another machine
    is_running: bool  # one of this machine's own services answers
    start_command: str = "docker compose up -d"


def check_reached(reached: ConnectionResult, here: Here) -> list[Outcome]:
    """One try from this machine."""
    where = here.machine
    shown = f"{reached.name} at {reached.url}"
    if reached.outcome != "open":
        return [_not_reached(reached, here, where, shown, is_from_here=True)]
    outcomes = [ok("reach", where, shown + _speed(reached))]
    if reached.detail:
        why = "a stolen password would open everything else that is kept there"
        cure = "docker compose run --rm init && docker compose up -d   (on machine A: makes its access list)"
        outcomes.append(warning("lock", where, f"{shown}: {reached.detail}.", why=why, cure=cure))
    if host_of(reached.url) not in (here.host, "127.0.0.1", "localhost"):
        outcomes += _check_speed(reached, where, shown)
        outcomes += _check_clock(reached, where, here)
    return outcomes


def check_way_back(report: ConnectivityReport, machines: Mapping[str, str], here: Here) -> list[Outcome]:
    """Whom another service reaches, as it says itself; `machines` by the names of services."""
    where = report.machine or report.name
    outcomes: list[Outcome] = []
    for reached in report.results:
        shown = f"{report.name} to {reached.name} at {reached.url}"
        machine = reached.machine or machines.get(reached.name, "")
        if reached.outcome != "open":
            outcomes.append(_not_reached(reached, here, where, shown, is_from_here=False))
        elif report.machine and machine and machine != report.machine:
            outcomes += _check_speed(reached, where, shown)
    names = [f"{reached.name}{_speed(reached)}" for reached in report.results if reached.outcome == "open"]
    if names:
        outcomes.insert(0, ok("way back", where, f"{report.name} reaches {', '.join(names)}"))
    return outcomes


def _not_reached(reached: ConnectionResult, here: Here, where: str, shown: str, *, is_from_here: bool) -> Outcome:
    why = WHY.get(reached.name, WHY_STAGE)
    host = host_of(reached.url)
    if reached.outcome == "no_such_name":
        look = LOOK_UP[here.system].format(name=host)
        cure = f"{look}   (asks again)\nor put the machine's IP address in its place, in .env"
        return error(
            "reach",
            where,
            f"{shown}: the name {host!r} does not resolve {'here' if is_from_here else 'there'}.",
            why=why,
            cure=cure,
        )
    if reached.outcome == "silent":
        what = f"{shown}: packets get no answer ({reached.detail}): a firewall drops them, or the machine is off."
        return error("reach", where, what, why=why, cure=FIREWALL_CURE.format(host=host))
    if reached.outcome == "no_way":
        what = f"{shown}: no way leads there ({reached.detail})."
        return error("reach", where, what, why=why, cure=FIREWALL_CURE.format(host=host))
    if reached.outcome == "refused":
        what = f"{shown}: refused, nothing listens on that port."
        cure = f"on that machine: {here.start_command}   (starts it)"
        if is_from_here and not here.is_running:
            return warning("reach", where, what, why=f"not started yet? {why}", cure=cure)
        return error("reach", where, what, why=why, cure=cure)
    if reached.outcome == "unlocked":
        return error(
            "lock",
            where,
            f"{shown} accepts commands from everyone, without a password.",
            why="whoever is on the network can read and change plans and requests",
            cure="docker compose run --rm init && docker compose up -d   (makes its password and access list)",
        )
    if reached.outcome == "locked":
        secret = "Valkey password" if reached.name == "valkey" else "cluster token"
        what = f"{shown} answers, but refuses the {secret} of {where} (401: {reached.detail})."
        return error("lock", where, what, why="the machines must share one", cure=JOIN_CURE)
    what = f"{shown}: {reached.detail}."
    cure = "git pull && docker compose up -d --build   (on both machines), or correct address and port in .env"
    return error("reach", where, what, why=why, cure=cure)


def _check_speed(reached: ConnectionResult, where: str, shown: str) -> list[Outcome]:
    seconds, speed = reached.round_trip_seconds, reached.bytes_per_second
    slow = []
    if seconds is not None and seconds > SLOW_ROUND_TRIP_SECONDS:
        slow.append(f"a round trip takes {seconds * 1000:.1f} ms (wired: under {SLOW_ROUND_TRIP_SECONDS * 1000:.0f})")
    if speed is not None and speed < SLOW_BYTES_PER_SECOND:
        slow.append(f"bytes come at {speed / 1e6:.1f} MB/s (wired gigabit: over {SLOW_BYTES_PER_SECOND / 1e6:.0f})")
    if not slow:
        return []
    return [
        warning(
            "speed",
            where,
            f"{shown}: {' and '.join(slow)}. That is as slow as Wi-Fi.",
            why="every token makes one trip to each stage, and a long prompt sends megabytes",
            cure="connect both machines by cable to the same router or switch (gigabit)",
        )
    ]


def _check_clock(reached: ConnectionResult, where: str, here: Here) -> list[Outcome]:
    ahead_seconds = reached.clock_ahead_seconds
    if ahead_seconds is None:
        return []
    if abs(ahead_seconds) <= CLOCK_SECONDS:
        return [ok("clock", where, f"{reached.machine or host_of(reached.url)}'s clock agrees")]
    cures = {
        "linux": "sudo timedatectl set-ntp true   (on both machines)",
        "windows": "w32tm /resync   (as administrator, on both machines)",
        "other": "set both clocks by the network",
    }
    way = "ahead of" if ahead_seconds > 0 else "behind"
    return [
        warning(
            "clock",
            where,
            f"The clock of {reached.machine or host_of(reached.url)} is {abs(ahead_seconds):.0f} s {way} this one.",
            why="logs and metrics of the two do not fit together (no token depends on it)",
            cure=cures[here.system],
        )
    ]


def check_versions(seen: Sequence[tuple[str, str]], here: Here) -> Outcome:
    """`seen`: names of services and the noodle version that each runs."""
    known = [(name, version) for name, version in dict.fromkeys(seen) if version]
    if not known:
        return skipped("version", here.machine, "no service said which noodle it runs")
    others = [f"{name} has {version}" for name, version in known if version != here.version]
    if not others:
        return ok("version", here.machine, f"noodle {here.version} everywhere")
    return error(
        "version",
        here.machine,
        f"This noodle is {here.version}, but {', '.join(others)}.",
        why="messages between versions are not promised to be understood",
        cure="git pull && docker compose up -d --build   (on every machine, the same commit)",
    )


def check_digests(seen: Sequence[tuple[str, str]], here: Here) -> Outcome:
    """`seen`: names of services and the digest of the model each has."""
    known = {name: digest for name, digest in seen if digest}
    if len(known) < 2:  # one has nobody to be compared with
        return skipped("weights", here.machine, "fewer than two services said which weights they have")
    digests = sorted(set(known.values()))
    if len(digests) == 1:
        return ok("weights", here.machine, f"{', '.join(sorted(known))}: the same weights ({digests[0][:12]})")
    shown = "; ".join(f"{name} has {digest[:12]}" for name, digest in sorted(known.items()))
    return error(
        "weights",
        here.machine,
        f"The services have different weights: {shown}.",
        why="layers of two models make no text, and the stages refuse the plan",
        cure="docker compose up -d   (on every machine: stages take A's weights unless NOODLE_MODEL says otherwise)",
    )


def _speed(reached: ConnectionResult) -> str:
    parts = []
    if reached.round_trip_seconds is not None:
        parts.append(f"{reached.round_trip_seconds * 1000:.2f} ms")
    if reached.bytes_per_second is not None:
        parts.append(f"{reached.bytes_per_second / 1e6:.0f} MB/s")
    return f" ({', '.join(parts)})" if parts else ""
