"""Names and addresses for `noodle doctor`: what does not resolve, and what points at whoever reads it.

A stage says under which URL the others find it. One that says localhost sends every other machine to itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

from noodle.config.addresses import host_of, why_only_local
from services.cli.doctor.outcome import Outcome, error, ok, skipped
from services.cli.project.programs import System

LOOK_UP = {
    "linux": "getent hosts {name}",
    "windows": "Resolve-DnsName {name}",
    "other": "ping {name}",
}
OWN_ADDRESS = {
    "linux": "ip -4 -brief address",
    "windows": "ipconfig",
    "other": "ifconfig",
}


def check_advertised(what: str, url: str, variable: str, where: str, system: System) -> Outcome:
    """One URL or address under which others are to find something, on a cluster of several machines."""
    host = host_of(url) if "://" in url else url
    reason = why_only_local(host) if host else "it is empty"
    if not reason:
        return ok("address", where, f"{what}: {url}")
    return error(
        "address",
        where,
        f"{what} is {url or 'empty'}, and that points at itself: {reason}.",
        why="the other machine would look for it on itself",
        cure=f"{OWN_ADDRESS[system]}   (shows this machine's addresses)\n"
        f"then set {variable} to the one on the home network, as 192.168.1.101, and start again",
    )


def unresolved(hosts: Sequence[str], resolve: Callable[[str], object]) -> list[str]:
    """Which of these names nobody knows."""
    missing = []
    for host in dict.fromkeys(hosts):
        try:
            resolve(host)
        except (socket.gaierror, UnicodeError):
            missing.append(host)
    return missing


def resolve(host: str) -> object:
    """Ask this system's resolver; raises socket.gaierror."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)


def check_names(hosts: Sequence[str], missing: Sequence[str], where: str, system: System) -> list[Outcome]:
    """Every host that this machine's configuration names."""
    if not hosts:
        return [skipped("names", where, "no address of a service is configured yet")]
    names = [host for host in dict.fromkeys(hosts) if not _is_address(host)]
    if not names:
        return [ok("names", where, "only IP addresses are used")]
    outcomes = []
    for name in names:
        if name not in missing:
            outcomes.append(ok("names", where, f"{name} resolves"))
            continue
        look = LOOK_UP[system].format(name=name)
        outcomes.append(
            error(
                "names",
                where,
                f"The name {name!r} does not resolve.",
                why="nothing can be reached under it",
                cure=f"{look}   (asks again)\nor put the machine's IP address in its place, in .env",
            )
        )
    return outcomes


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
