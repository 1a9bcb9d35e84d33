"""Firewall rules for the ports that this machine publishes: from .env to scripts for Linux and Windows.

On Linux, packets to ports that Docker publishes do not pass INPUT, and so not ufw: the rules are in DOCKER-USER, and
match the port and address that a packet had before Docker rewrote them. On Windows every allow rule counts, and Docker
Desktop adds one for everybody: it is narrowed to the same addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from noodle.errors import ConfigurationError
from services.cli.project.programs import run_program
from services.cli.project.project import LOOPBACK, Project

CHAIN = "NOODLE"
DOCKER_CHAIN = "DOCKER-USER"
LOCK_SECONDS = 5  # waiting for another program that changes rules
WINDOWS_GROUP = "noodle"
DOCKER_RULE = "Docker Desktop Backend"
SCRIPT_PATH = Path("/usr/local/sbin/noodle-firewall")
UNIT_NAME = "noodle-firewall.service"
UNIT_PATH = Path("/etc/systemd/system") / UNIT_NAME
DOCKER_SECONDS = 10.0  # Docker's answer about a network
OWN_NETWORK = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"


class Opening(Struct, frozen=True):
    """One port, and the addresses or networks that may connect to it; it is closed to all others."""

    service: str
    port: int
    sources: tuple[str, ...]


def openings_of(project: Project, clients: Sequence[str], own_networks: Sequence[str] = ()) -> list[Opening]:
    """Return who may connect to which port.

    `clients` are addresses of people's machines, `own_networks` those of this machine's containers. Raises
    ConfigurationError if the machine publishes nothing to the network, or for an invalid address.
    """
    if project.role == "single":
        raise ConfigurationError(
            "This machine runs everything itself and publishes its ports only on 127.0.0.1.",
            cure="Nothing is open to the network, so nothing needs to be closed.",
        )
    peers = [_network(project.peer_address, "NOODLE_PEER_ADDRESS in .env")]
    people = [_network(client, "--clients") for client in clients]
    own = [_network(network, "Docker's network") for network in own_networks]
    openings = []
    for published in project.published():
        sources = peers if "machine" in published.clients else []
        sources = [*sources, *(people if "people" in published.clients else []), *own]
        openings.append(Opening(published.service, published.port, tuple(dict.fromkeys(sources))))
    return openings


def own_networks(project: Project) -> list[str]:
    """Return the networks of this machine's containers, which also connect to each other by published ports.

    There are none before the first `docker compose up`.
    """
    name = project.values.get("COMPOSE_PROJECT_NAME") or "noodle"
    ran = run_program(["docker", "network", "inspect", f"{name}_default", "--format", OWN_NETWORK], DOCKER_SECONDS)
    return [text for text in ran.output.split() if ":" not in text] if ran.is_good else []


def _network(text: str, what: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigurationError(
            f"{what} is {text!r}, which is not an IP address.",
            cure="Give the other machine's address, as 192.168.1.102: run `noodle init` again with --peer.",
        ) from error
    if network.version != 4 or network.prefixlen == 0:
        raise ConfigurationError(f"{what} is {text!r}, which is not an IPv4 address or network, or is all of them.")
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def linux_script(openings: Sequence[Opening], lan_address: str) -> str:
    """Return a shell script that replaces the rules in noodle's chain at once; it may run again.

    It affects only packets to this machine's published ports, never ssh.
    """
    if lan_address == LOOPBACK:
        raise ConfigurationError("NOODLE_LAN_ADDRESS in .env is 127.0.0.1.", cure="Run `noodle init` again.")
    rules = []
    for opening in openings:
        match = f"-p tcp -m conntrack --ctorigdst {lan_address} --ctorigdstport {opening.port} --ctdir ORIGINAL"
        rules += [f"-A {CHAIN} -s {source} {match} -j RETURN" for source in opening.sources]
        rules.append(f"-A {CHAIN} {match} -j DROP")
    return f"""\
#!/bin/sh
# Written by `noodle firewall --apply`, removed by `noodle firewall --undo`: who may connect to the ports
# that noodle's containers publish. Packets to other ports, as ssh, are not affected.
set -e
iptables-restore -w {LOCK_SECONDS} --noflush <<'RULES'
*filter
:{CHAIN} - [0:0]
{"".join(f"{rule}{chr(10)}" for rule in rules)}COMMIT
RULES
iptables -w {LOCK_SECONDS} -C {DOCKER_CHAIN} -j {CHAIN} 2>/dev/null ||
    iptables -w {LOCK_SECONDS} -I {DOCKER_CHAIN} -j {CHAIN}
"""


def systemd_unit(script_path: str) -> str:
    """Return the unit that runs the script after each start of Docker."""
    return f"""\
[Unit]
Description=Firewall rules for the ports that noodle publishes
Requires=docker.service
After=docker.service
PartOf=docker.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={script_path}

[Install]
WantedBy=docker.service
"""


def windows_script(openings: Sequence[Opening]) -> str:
    """Return PowerShell that replaces noodle's rules and narrows Docker Desktop's own; it may run again."""
    rules = [
        f"New-NetFirewallRule -DisplayName 'noodle {opening.service} {opening.port}' -Group '{WINDOWS_GROUP}' "
        f"-Direction Inbound -Action Allow -Protocol TCP -LocalPort {opening.port} "
        f"-RemoteAddress {_listed(opening.sources)} -Profile Any | Out-Null"
        for opening in openings
        if opening.sources
    ]
    everyone = list(dict.fromkeys(source for opening in openings for source in opening.sources))
    return _windows_rules(rules, _listed(everyone))


def windows_undo() -> str:
    """Return PowerShell that removes noodle's rules and resets Docker Desktop's own to everybody."""
    return _windows_rules([], "Any")


def _windows_rules(rules: Sequence[str], docker_sources: str) -> str:
    lines = (
        "$ErrorActionPreference = 'Stop'",
        f"Get-NetFirewallRule -Group '{WINDOWS_GROUP}' -ErrorAction SilentlyContinue | Remove-NetFirewallRule",
        *rules,
        f"Get-NetFirewallRule -DisplayName '{DOCKER_RULE}' -ErrorAction SilentlyContinue | "
        f"Set-NetFirewallRule -RemoteAddress {docker_sources}",
    )
    return "".join(f"{line}\n" for line in lines)


def in_words(openings: Sequence[Opening]) -> list[str]:
    return [
        f"{opening.port:5} {opening.service:12} open to "
        + (", ".join(opening.sources) if opening.sources else "this machine only")
        for opening in openings
    ]


def _listed(sources: Sequence[str]) -> str:
    return ",".join(f"'{source}'" for source in sources)
