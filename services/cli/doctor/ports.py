"""The ports that this machine publishes: free, used by noodle, or used by another program."""

from __future__ import annotations

import errno
import re
import socket
import sys
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from noodle.errors import NoodleError
from services.cli.client.http_client import get_json
from services.cli.doctor.results import CheckResult, error, ok
from services.cli.project.programs import Run, System

DOCKER_SECONDS = 5.0  # one question to Docker
LIST_SECONDS = 5.0  # the list of listening programs
HEALTH_SECONDS = 1.0  # one question for /health
PROJECT_NAME = "noodle"  # of compose, unless .env names another

Holder = Literal["nobody", "noodle", "other", "no_address", "denied"]


class Port(Struct, frozen=True):
    """One port on one address, with its service and the variable that moves it."""

    service: str
    variable: str
    address: str
    number: int


class PortFacts(Struct, frozen=True):
    """Who listens on a port."""

    port: Port
    holder: Holder
    program: str = ""


def gather_port(run: Run, port: Port, own_ports: Sequence[int], project_name: str = PROJECT_NAME) -> PortFacts:
    """Try to listen on a port, and find out who does if that fails.

    `own_ports` are those of a `noodle up` that runs here, `project_name` is this machine's project in compose.
    """
    problem = _try_to_listen(port.address, port.number)
    if problem is None:
        return PortFacts(port, "nobody")
    if problem == errno.EADDRNOTAVAIL:
        return PortFacts(port, "no_address")
    if problem == errno.EACCES and sys.platform != "win32":  # on Windows it also means that another program has it
        return PortFacts(port, "denied")
    if port.number in own_ports:
        return PortFacts(port, "noodle", "`noodle up`")
    container = _container_on(run, port.number)
    if container is not None:
        project, name = container
        return PortFacts(port, "noodle" if project == project_name else "other", name)
    if _is_noodle(port):
        return PortFacts(port, "noodle", "a service of noodle")
    return PortFacts(port, "other", _program_on(run, port.number))


def check_port(facts: PortFacts, where: str, system: System) -> CheckResult:
    port, number = facts.port, facts.port.number
    shown = f"{number} on {port.address} ({port.service})"
    why = f"compose cannot publish {port.service}, and does not start it"
    if facts.holder == "nobody":
        return ok("port", where, f"{shown} is free")
    if facts.holder == "noodle":
        return ok("port", where, f"{shown} is used by {facts.program}")
    if facts.holder == "no_address":
        what = f"{port.address} is not an address of this machine (NOODLE_LAN_ADDRESS in .env)."
        look = {"linux": "ip -4 address", "windows": "ipconfig", "other": "ifconfig"}[system]
        why = "compose cannot publish a port on it, and starts nothing"
        cure = f"{look}   (then put the right one into .env, or run init again)"
        return error("address", where, what, why=why, cure=cure)
    if facts.holder == "denied":
        what = f"This user may not listen on {shown}."
        return error("port", where, what, why=why, cure=f"set {port.variable} to a port from 1024 on, in .env")
    look = {
        "linux": f"sudo ss -ltnp 'sport = :{number}'",
        "windows": f"Get-Process -Id (Get-NetTCPConnection -LocalPort {number}).OwningProcess",
        "other": f"lsof -i :{number}",
    }[system]
    what = f"{shown} is taken by {facts.program or 'another program'}."
    cure = f"{look}   (shows the program: stop it)\nor set {port.variable} to another port in .env"
    return error("port", where, what, why=why, cure=cure)


def _try_to_listen(address: str, port: int) -> int | None:
    """Return the system's error number, None if this process can listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except socket.gaierror:
            return errno.EADDRNOTAVAIL
        except OSError as problem:
            return problem.errno
    return None


def _container_on(run: Run, port: int) -> tuple[str, str] | None:
    """Return compose project and name of the container that publishes a port."""
    form = '{{.Label "com.docker.compose.project"}}\t{{.Names}}\t{{.Ports}}'
    ran = run(["docker", "ps", "--format", form], DOCKER_SECONDS)
    for line in ran.output.splitlines() if ran.is_good else ():
        parts = line.split("\t")
        if len(parts) == 3 and re.search(rf":{port}->", parts[2]):
            return parts[0], f"the container {parts[1]}"
    return None


def _is_noodle(port: Port) -> bool:
    try:
        _, answer = get_json(f"http://{port.address}:{port.number}/health", timeout_seconds=HEALTH_SECONDS)
    except NoodleError:
        return False
    return answer.get("service") in ("coordinator", "planner", "stage")


def _program_on(run: Run, port: int) -> str:
    """Return the program that listens on a port; empty if this user may not see it."""
    if sys.platform == "win32":
        command = f"(Get-Process -Id (Get-NetTCPConnection -State Listen -LocalPort {port}).OwningProcess).ProcessName"
        ran = run(["powershell", "-NoProfile", "-Command", command], LIST_SECONDS)
        return " ".join(ran.output.split()) if ran.is_good else ""
    ran = run(["ss", "-Hltnp", f"sport = :{port}"], LIST_SECONDS)
    found = re.search(r'\("([^"]+)",pid=(\d+)', ran.output) if ran.is_good else None
    return f"{found[1]} (process {found[2]})" if found else ""
