"""Judges names, addresses and links: unresolved, unreachable, locked, slow, or of another version."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from noodle.config.addresses import host_of, why_only_local
from noodle.web.connectivity import ConnectionResult, ConnectivityReport
from services.cli.doctor.results import CheckResult, error, ok, skipped, warning
from services.cli.project.programs import System

# A wired home network has round trips of 0.3 to 1 ms and 110 MB/s; Wi-Fi 2 to 10 ms and 3 to 40 MB/s.
SLOW_ROUND_TRIP_SECONDS = 0.002  # longer ones are as slow as Wi-Fi
SLOW_BYTES_PER_SECOND = 30e6  # less is as slow as Wi-Fi
CLOCK_SECONDS = 5.0  # of difference between two clocks; HTTP's whole seconds and a slow answer cause less

LOOK_UP = {"linux": "getent hosts {name}", "windows": "Resolve-DnsName {name}", "other": "ping {name}"}
OWN_ADDRESS = {"linux": "ip -4 -brief address", "windows": "ipconfig", "other": "ifconfig"}
CLOCK_CURES = {
    "linux": "sudo timedatectl set-ntp true   (on both machines)",
    "windows": "w32tm /resync   (as administrator, on both machines)",
    "other": "set both clocks from the network",
}
JOIN_CURE = (
    "on machine A: docker compose run --rm init   (prints B's join line again)\n"
    "on machine B: delete secrets/, docker compose run --rm init --machine b --join ..., docker compose up -d"
)
FIREWALL_CURE = (
    "ping {host}   (is it on, and on this network?)\n"
    "on that machine: sudo deploy/firewall.sh --apply   (Linux), or deploy\\firewall.ps1 -Apply   (Windows)"
)
WHY = {
    "coordinator": "requests, weights and results go through it",
    "planner": "it makes the plan",
    "valkey": "stages register in it; without it there is no plan",
}
WHY_STAGE = "hidden states travel from stage to stage through this port"


class Here(Struct, frozen=True, kw_only=True):
    """The machine that runs the doctor."""

    machine: str
    system: System
    version: str
    host: str  # its own address; other addresses are on other machines
    is_running: bool  # one of this machine's own services answers
    start_command: str = "docker compose up -d"


def check_reached(reached: ConnectionResult, here: Here) -> list[CheckResult]:
    where = here.machine
    shown = f"{reached.name} at {reached.url}"
    if reached.outcome != "open":
        return [_not_reached(reached, here, where, shown, is_from_here=True)]
    results = [ok("reach", where, shown + _speed(reached))]
    if reached.detail:
        why = "a stolen password would also open everything else in it"
        cure = "docker compose run --rm init && docker compose up -d   (on machine A: writes its access list)"
        results.append(warning("lock", where, f"{shown}: {reached.detail}.", why=why, cure=cure))
    if host_of(reached.url) not in (here.host, "127.0.0.1", "localhost"):
        results += _check_speed(reached, where, shown)
        results += _check_clock(reached, where, here)
    return results


def check_way_back(report: ConnectivityReport, machines: Mapping[str, str], here: Here) -> list[CheckResult]:
    """Judge a service's own report about which others it reaches; `machines` has the machine of each service."""
    where = report.machine or report.name
    results: list[CheckResult] = []
    for reached in report.results:
        shown = f"{report.name} to {reached.name} at {reached.url}"
        machine = reached.machine or machines.get(reached.name, "")
        if reached.outcome != "open":
            results.append(_not_reached(reached, here, where, shown, is_from_here=False))
        elif report.machine and machine and machine != report.machine:
            results += _check_speed(reached, where, shown)
    names = [f"{reached.name}{_speed(reached)}" for reached in report.results if reached.outcome == "open"]
    if names:
        results.insert(0, ok("way back", where, f"{report.name} reaches {', '.join(names)}"))
    return results


def _not_reached(reached: ConnectionResult, here: Here, where: str, shown: str, *, is_from_here: bool) -> CheckResult:
    why, host = WHY.get(reached.name, WHY_STAGE), host_of(reached.url)
    if reached.outcome == "unlocked":
        why = "anyone on the network can read and change plans and requests"
        cure = "docker compose run --rm init && docker compose up -d   (writes its password and access list)"
        return error("lock", where, f"{shown} accepts commands without a password.", why=why, cure=cure)
    if reached.outcome == "locked":
        secret = "Valkey password" if reached.name == "valkey" else "cluster token"
        what = f"{shown} answers, but refuses the {secret} of {where} (401: {reached.detail})."
        return error("lock", where, what, why="all machines must have the same one", cure=JOIN_CURE)
    blocked = FIREWALL_CURE.format(host=host)
    problems = {
        "no_such_name": (
            f"the name {host!r} does not resolve {'here' if is_from_here else 'there'}",
            _name_cure(host, here.system),
        ),
        "silent": (f"no answer ({reached.detail}): a firewall drops the packets, or the machine is off", blocked),
        "no_way": (f"there is no route to it ({reached.detail})", blocked),
        "refused": ("refused, nothing listens on that port", f"on that machine: {here.start_command}   (starts it)"),
    }
    update = "git pull && docker compose up -d --build   (on both machines), or correct the address and port in .env"
    what, cure = problems.get(reached.outcome, (reached.detail, update))
    if reached.outcome == "refused" and is_from_here and not here.is_running:
        return warning("reach", where, f"{shown}: {what}.", why=f"not started yet? {why}", cure=cure)
    return error("reach", where, f"{shown}: {what}.", why=why, cure=cure)


def _name_cure(name: str, system: System) -> str:
    return f"{LOOK_UP[system].format(name=name)}   (asks again)\nor use the machine's IP address instead, in .env"


def _check_speed(reached: ConnectionResult, where: str, shown: str) -> list[CheckResult]:
    seconds, speed = reached.round_trip_seconds, reached.bytes_per_second
    slow = []
    if seconds is not None and seconds > SLOW_ROUND_TRIP_SECONDS:
        slow.append(f"a round trip takes {seconds * 1000:.1f} ms (wired: under {SLOW_ROUND_TRIP_SECONDS * 1000:.0f})")
    if speed is not None and speed < SLOW_BYTES_PER_SECOND:
        slow.append(f"the bandwidth is {speed / 1e6:.1f} MB/s (wired gigabit: over {SLOW_BYTES_PER_SECOND / 1e6:.0f})")
    if not slow:
        return []
    what = f"{shown}: {' and '.join(slow)}. That is as slow as Wi-Fi."
    why = "every token makes one trip to each stage, and a long prompt sends megabytes"
    cure = "connect both machines by cable to the same router or switch (gigabit)"
    return [warning("speed", where, what, why=why, cure=cure)]


def _check_clock(reached: ConnectionResult, where: str, here: Here) -> list[CheckResult]:
    ahead_seconds, machine = reached.clock_ahead_seconds, reached.machine or host_of(reached.url)
    if ahead_seconds is None:
        return []
    if abs(ahead_seconds) <= CLOCK_SECONDS:
        return [ok("clock", where, f"{machine}'s clock agrees")]
    side = "ahead of" if ahead_seconds > 0 else "behind"
    what = f"The clock of {machine} is {abs(ahead_seconds):.0f} s {side} this one."
    why = "their logs and metrics do not match in time (tokens do not depend on it)"
    return [warning("clock", where, what, why=why, cure=CLOCK_CURES[here.system])]


def check_versions(seen: Sequence[tuple[str, str]], here: Here) -> CheckResult:
    """Judge the services' versions of noodle: (service, version)."""
    known = [(name, version) for name, version in dict.fromkeys(seen) if version]
    if not known:
        return skipped("version", here.machine, "no service reported its version")
    others = [f"{name} has {version}" for name, version in known if version != here.version]
    if not others:
        return ok("version", here.machine, f"noodle {here.version} everywhere")
    what = f"This noodle is {here.version}, but {', '.join(others)}."
    why = "different versions may not understand each other's messages"
    cure = "git pull && docker compose up -d --build   (on every machine, the same commit)"
    return error("version", here.machine, what, why=why, cure=cure)


def check_digests(seen: Sequence[tuple[str, str]], here: Here) -> CheckResult:
    """Judge the digests of the services' models: (service, digest)."""
    known = {name: digest for name, digest in seen if digest}
    if len(known) < 2:
        return skipped("weights", here.machine, "fewer than two services reported their weights")
    digests = sorted(set(known.values()))
    if len(digests) == 1:
        return ok("weights", here.machine, f"{', '.join(sorted(known))}: the same weights ({digests[0][:12]})")
    shown = "; ".join(f"{name} has {digest[:12]}" for name, digest in sorted(known.items()))
    what = f"The services have different weights: {shown}."
    why = "layers of different models do not work together, and the stages refuse the plan"
    cure = "docker compose up -d   (on every machine: stages take A's weights unless NOODLE_MODEL says otherwise)"
    return error("weights", here.machine, what, why=why, cure=cure)


def _speed(reached: ConnectionResult) -> str:
    parts = []
    if reached.round_trip_seconds is not None:
        parts.append(f"{reached.round_trip_seconds * 1000:.2f} ms")
    if reached.bytes_per_second is not None:
        parts.append(f"{reached.bytes_per_second / 1e6:.0f} MB/s")
    return f" ({', '.join(parts)})" if parts else ""


def check_advertised(what: str, url: str, variable: str, where: str, system: System) -> CheckResult:
    """Judge one URL or address by which other machines find a service."""
    host = host_of(url) if "://" in url else url
    reason = why_only_local(host) if host else "it is empty"
    if not reason:
        return ok("address", where, f"{what}: {url}")
    what = f"{what} is {url or 'empty'}, which other machines cannot use: {reason}."
    cure = (
        f"{OWN_ADDRESS[system]}   (shows this machine's addresses)\n"
        f"then set {variable} to the one on the home network, as 192.168.1.101, and restart"
    )
    return error("address", where, what, why="the other machine would connect to itself", cure=cure)


def unresolved(hosts: Sequence[str], resolve: Callable[[str], object]) -> list[str]:
    missing = []
    for host in dict.fromkeys(hosts):
        try:
            resolve(host)
        except (socket.gaierror, UnicodeError):
            missing.append(host)
    return missing


def check_names(hosts: Sequence[str], missing: Sequence[str], where: str, system: System) -> list[CheckResult]:
    if not hosts:
        return [skipped("names", where, "no address of a service is configured yet")]
    names = [host for host in dict.fromkeys(hosts) if not _is_address(host)]
    if not names:
        return [ok("names", where, "only IP addresses are used")]
    why = "no service can be reached by it"
    return [
        ok("names", where, f"{name} resolves")
        if name not in missing
        else error("names", where, f"The name {name!r} does not resolve.", why=why, cure=_name_cure(name, system))
        for name in names
    ]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
