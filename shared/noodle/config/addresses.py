"""Hosts in URLs: which of them send another machine to itself; pure, nothing is looked up."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

DOCKER_BRIDGE = ipaddress.ip_network("172.17.0.0/16")  # Docker's own network, the same on every machine
SERVICE_NAMES = ("valkey", "planner", "coordinator", "stage-0", "stage-1", "prometheus", "grafana")


def host_of(url: str) -> str:
    """The host of a URL, also of one that is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def why_it_points_at_itself(host: str) -> str:
    """Why another machine that uses this host would not come here; empty when it would."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost" or host.endswith(".localhost"):
            return "localhost is whoever reads it"
        if host in SERVICE_NAMES:
            return f"{host} is a name inside one machine's compose network"
        return "host.docker.internal is known to containers of one machine alone" if host.endswith(".internal") else ""
    if address.is_loopback:
        return f"{host} is whoever reads it"
    if address.is_unspecified:
        return f"{host} means every address and none"
    if address in DOCKER_BRIDGE:
        return f"{host} is Docker's own bridge, which every machine has"
    return ""
