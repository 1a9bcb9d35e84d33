"""Which of this machine's published ports are open to whom: from .env to rules, for Linux and Windows; pure.

On Linux the ports that Docker publishes pass by INPUT, and with it by ufw: the rules stand in DOCKER-USER, and match
the port and address that a packet had before Docker rewrote them. On Windows every allow rule counts, and Docker
Desktop brings one for everybody: that is narrowed to the same addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from msgspec import Struct

from noodle.errors import ConfigurationError
from services.cli.project.project import LOOPBACK, Project, Published

CHAIN = "NOODLE"
DOCKER_CHAIN = "DOCKER-USER"
LOCK_SECONDS = 5  # for another program that changes rules
WINDOWS_GROUP = "noodle"
DOCKER_RULE = "Docker Desktop Backend"


class Opening(Struct, frozen=True):
    """One port, and the addresses or networks that may come to it; for all others it is closed."""

    service: str
    port: int
    sources: tuple[str, ...]


def openings_of(project: Project, clients: Sequence[str], own_networks: Sequence[str] = ()) -> list[Opening]:
    """`clients` are addresses of people's machines; `own_networks` those of this machine's containers.

    Raises ConfigurationError where there is nothing to open, or an address is none.
    """
    if project.role == "single":
        raise ConfigurationError(
            "This machine runs everything itself, and publishes its ports on 127.0.0.1 alone.",
            cure="Nothing is open to the network, and nothing needs to be closed.",
        )
    peers = [_network(project.peer_address, "NOODLE_PEER_ADDRESS in .env")]
    people = [_network(client, "--clients") for client in clients]
    own = [_network(network, "Docker's network") for network in own_networks]
    return [_opening(published, peers, people, own) for published in project.published()]


def _opening(published: Published, peers: list[str], people: list[str], own: list[str]) -> Opening:
    sources = (peers if "machine" in published.readers else []) + (people if "people" in published.readers else [])
    return Opening(published.service, published.port, tuple(dict.fromkeys([*sources, *own])))


def _network(text: str, what: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigurationError(
            f"{what} is {text!r}, which is no IP address.",
            cure="Give the other machine's address, as 192.168.1.102: run `noodle init` again with --peer.",
        ) from error
    if network.version != 4 or network.prefixlen == 0:
        raise ConfigurationError(f"{what} is {text!r}: an IPv4 address or network is needed, and not all of them.")
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def linux_script(openings: Sequence[Opening], lan_address: str) -> str:
    """A shell script that puts the rules in place of whatever stood in noodle's chain, at once; may run again.

    It touches no packet but those to this machine's published ports, and so never ssh.
    """
    if lan_address == LOOPBACK:
        raise ConfigurationError("NOODLE_LAN_ADDRESS in .env is 127.0.0.1.", cure="Run `noodle init` again.")
    rules = []
    for opening in openings:
        match = f"-p tcp -m conntrack --ctorigdst {lan_address} --ctorigdstport {opening.port} --ctdir ORIGINAL"
        rules += [f"-A {CHAIN} -s {source} {match} -j RETURN" for source in opening.sources]
        rules.append(f"-A {CHAIN} {match} -j DROP")
    return "\n".join(
        [
            "#!/bin/sh",
            "# Written by `noodle firewall --apply`, removed by `noodle firewall --undo`: who may come to the ports",
            "# that noodle's containers publish. Packets to any other port, ssh among them, are not looked at.",
            "set -e",
            f"iptables-restore -w {LOCK_SECONDS} --noflush <<'RULES'",
            "*filter",
            f":{CHAIN} - [0:0]",
            *rules,
            "COMMIT",
            "RULES",
            f"iptables -w {LOCK_SECONDS} -C {DOCKER_CHAIN} -j {CHAIN} 2>/dev/null ||",
            f"    iptables -w {LOCK_SECONDS} -I {DOCKER_CHAIN} -j {CHAIN}",
            "",
        ]
    )


def linux_undo() -> list[list[str]]:
    """The commands that take the rules away; each fails where there is nothing to take away."""
    iptables = ["iptables", "-w", str(LOCK_SECONDS)]
    return [
        [*iptables, "-D", DOCKER_CHAIN, "-j", CHAIN],
        [*iptables, "-F", CHAIN],
        [*iptables, "-X", CHAIN],
    ]


def systemd_unit(script_path: str) -> str:
    """The unit that runs the script after Docker, at each boot and when Docker is started anew."""
    return "\n".join(
        [
            "[Unit]",
            "Description=Who may come to the ports that noodle publishes",
            "Requires=docker.service",
            "After=docker.service",
            "PartOf=docker.service",
            "",
            "[Service]",
            "Type=oneshot",
            "RemainAfterExit=yes",
            f"ExecStart={script_path}",
            "",
            "[Install]",
            "WantedBy=docker.service",
            "",
        ]
    )


def windows_script(openings: Sequence[Opening]) -> str:
    """PowerShell that puts the rules in place of noodle's old ones, and narrows Docker Desktop's own; may run again."""
    lines = [
        "$ErrorActionPreference = 'Stop'",
        f"Get-NetFirewallRule -Group '{WINDOWS_GROUP}' -ErrorAction SilentlyContinue | Remove-NetFirewallRule",
    ]
    for opening in openings:
        if opening.sources:
            lines.append(
                f"New-NetFirewallRule -DisplayName 'noodle {opening.service} {opening.port}' -Group '{WINDOWS_GROUP}' "
                f"-Direction Inbound -Action Allow -Protocol TCP -LocalPort {opening.port} "
                f"-RemoteAddress {_listed(opening.sources)} -Profile Any | Out-Null"
            )
    everyone = list(dict.fromkeys(source for opening in openings for source in opening.sources))
    lines.append(
        f"Get-NetFirewallRule -DisplayName '{DOCKER_RULE}' -ErrorAction SilentlyContinue | "
        f"Set-NetFirewallRule -RemoteAddress {_listed(everyone)}"
    )
    return "\n".join([*lines, ""])


def windows_undo() -> str:
    """PowerShell that takes noodle's rules away, and lets Docker Desktop's own apply to everybody, as it came."""
    return "\n".join(
        [
            "$ErrorActionPreference = 'Stop'",
            f"Get-NetFirewallRule -Group '{WINDOWS_GROUP}' -ErrorAction SilentlyContinue | Remove-NetFirewallRule",
            f"Get-NetFirewallRule -DisplayName '{DOCKER_RULE}' -ErrorAction SilentlyContinue | "
            "Set-NetFirewallRule -RemoteAddress Any",
            "",
        ]
    )


def in_words(openings: Sequence[Opening]) -> list[str]:
    """One line a port."""
    return [
        f"{opening.port:5} {opening.service:12} open to "
        + (", ".join(opening.sources) if opening.sources else "nobody but this machine")
        for opening in openings
    ]


def _listed(sources: Sequence[str]) -> str:
    return ",".join(f"'{source}'" for source in sources)
