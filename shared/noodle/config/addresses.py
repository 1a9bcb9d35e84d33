"""Addresses of services: where one listens, and which hosts mean another machine; nothing is looked up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

DOCKER_BRIDGE = ipaddress.ip_network("172.17.0.0/16")  # Docker's own network, the same on every machine
SERVICE_NAMES = ("valkey", "planner", "coordinator", "stage-0", "stage-1", "prometheus", "grafana")


@dataclass(frozen=True)
class Address:
    """Where a service listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def host_of(url: str) -> str:
    """Return the host of a URL, empty when it has none or is malformed."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def why_only_local(host: str) -> str:
    """Return why another machine cannot use this host to reach this one; empty when it can."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost" or host.endswith(".localhost"):
            return "localhost means the machine that uses it"
        if host in SERVICE_NAMES:
            return f"{host} is a name inside one machine's compose network"
        return f"only the containers of one machine know {host}" if host.endswith(".internal") else ""
    if address.is_loopback:
        return f"{host} means the machine that uses it"
    if address.is_unspecified:
        return f"{host} means every address of a machine and cannot be connected to"
    if address in DOCKER_BRIDGE:
        return f"{host} is Docker's own bridge, which every machine has"
    return ""
