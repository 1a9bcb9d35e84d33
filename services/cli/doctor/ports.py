"""The ports that this machine publishes, for `noodle doctor`: free, noodle's own already, or another program's."""

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
from services.cli.doctor.outcome import Outcome, error, ok
from services.cli.project.programs import Run, System

DOCKER_SECONDS = 5.0
LIST_SECONDS = 5.0
HEALTH_SECONDS = 1.0
PROJECT_NAME = "noodle"  # of compose, unless .env says another

Holder = Literal["nobody", "noodle", "other", "no_address", "denied"]


class PortFacts(Struct, frozen=True):
    """One port on one address."""

    service: str
    variable: str
    address: str
    port: int
    holder: Holder
    program: str = ""


def gather_port(
    run: Run,
    service: str,
    variable: str,
    address: str,
    port: int,
    own_ports: Sequence[int],
    project_name: str = PROJECT_NAME,
) -> PortFacts:
    """Try to listen there; who has it, where that fails. `own_ports` are of a `noodle up` that runs here,
    `project_name` is what compose calls this machine's set."""
    problem = _try_to_listen(address, port)
    if problem is None:
        return PortFacts(service, variable, address, port, "nobody")
    if problem == errno.EADDRNOTAVAIL:
        return PortFacts(service, variable, address, port, "no_address")
    if problem == errno.EACCES and sys.platform != "win32":  # on Windows it also means that another program has it
        return PortFacts(service, variable, address, port, "denied")
    if port in own_ports:
        return PortFacts(service, variable, address, port, "noodle", "`noodle up`")
    container = _container_on(run, port)
    if container is not None:
        project, name = container
        return PortFacts(service, variable, address, port, "noodle" if project == project_name else "other", name)
    if _is_noodle(address, port):
        return PortFacts(service, variable, address, port, "noodle", "a service of noodle")
    return PortFacts(service, variable, address, port, "other", _program_on(run, port))


def check_port(facts: PortFacts, where: str, system: System) -> Outcome:
    """`variable` is the one that moves the port."""
    shown = f"{facts.port} on {facts.address} ({facts.service})"
    why = f"{facts.service} can not be published, and compose does not start it"
    if facts.holder == "nobody":
        return ok("port", where, f"{shown} is free")
    if facts.holder == "noodle":
        return ok("port", where, f"{shown} is {facts.program}")
    if facts.holder == "no_address":
        what = f"{facts.address} is not an address of this machine (NOODLE_LAN_ADDRESS in .env)."
        look = {"linux": "ip -4 address", "windows": "ipconfig", "other": "ifconfig"}[system]
        why = "no port can be published on it, and compose starts nothing"
        cure = f"{look}   (then put the right one into .env, or run init again)"
        return error("address", where, what, why=why, cure=cure)
    if facts.holder == "denied":
        what = f"{shown} may not be listened on by this user."
        return error("port", where, what, why=why, cure=f"set {facts.variable} to a port from 1024 on, in .env")
    look = {
        "linux": f"sudo ss -ltnp 'sport = :{facts.port}'",
        "windows": f"Get-Process -Id (Get-NetTCPConnection -LocalPort {facts.port}).OwningProcess",
        "other": f"lsof -i :{facts.port}",
    }[system]
    return error(
        "port",
        where,
        f"{shown} is taken by {facts.program or 'another program'}.",
        why=why,
        cure=f"{look}   (says who has it: stop that)\nor set {facts.variable} to another port in .env",
    )


def _try_to_listen(address: str, port: int) -> int | None:
    """The system's error number, None when one can listen there."""
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
    """Compose project and name of the container that publishes a port."""
    form = '{{.Label "com.docker.compose.project"}}\t{{.Names}}\t{{.Ports}}'
    ran = run(["docker", "ps", "--format", form], DOCKER_SECONDS)
    for line in ran.output.splitlines() if ran.is_good else ():
        parts = line.split("\t")
        if len(parts) == 3 and re.search(rf":{port}->", parts[2]):
            return parts[0], f"the container {parts[1]}"
    return None


def _is_noodle(address: str, port: int) -> bool:
    try:
        _, answer = get_json(f"http://{address}:{port}/health", timeout_seconds=HEALTH_SECONDS)
    except NoodleError:
        return False
    return answer.get("service") in ("coordinator", "planner", "stage")


def _program_on(run: Run, port: int) -> str:
    """The program that listens on a port, empty when this user may not know."""
    if sys.platform == "win32":
        command = f"(Get-Process -Id (Get-NetTCPConnection -State Listen -LocalPort {port}).OwningProcess).ProcessName"
        ran = run(["powershell", "-NoProfile", "-Command", command], LIST_SECONDS)
        return " ".join(ran.output.split()) if ran.is_good else ""
    ran = run(["ss", "-Hltnp", f"sport = :{port}"], LIST_SECONDS)
    found = re.search(r'\("([^"]+)",pid=(\d+)', ran.output) if ran.is_good else None
    return f"{found[1]} (process {found[2]})" if found else ""
