"""Docker: whether it is installed, new enough, running, and open to this user."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from services.cli.doctor.results import CheckResult, error, ok, skipped, warning
from services.cli.project.programs import Ran, Run, System

DOCKER_SECONDS = 10.0  # one question; Docker Desktop is slow while it starts
OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 20)
WHY_ENGINE = "every part of noodle runs in a container"

INSTALL = {
    "linux": "curl -fsSL https://get.docker.com | sudo sh",
    "windows": "winget install -e --id Docker.DockerDesktop",
    "other": "install Docker from https://docs.docker.com/get-docker/",
}
START = {
    "linux": "sudo systemctl enable --now docker",
    "windows": '& "$Env:ProgramFiles\\Docker\\Docker\\Docker Desktop.exe"   (then wait until it runs)',
    "other": "start Docker",
}
PERMIT = {
    "linux": "sudo usermod -aG docker $USER   (then log out and in again)",
    "windows": 'net localgroup docker-users "$Env:USERNAME" /add   (as administrator; then log out and in again)',
    "other": "give this user access to Docker's socket",
}
UPGRADE_COMPOSE = {
    "linux": "sudo apt-get update && sudo apt-get install -y docker-compose-plugin",
    "windows": "winget upgrade -e --id Docker.DockerDesktop",
    "other": "upgrade Docker",
}


class DockerFacts(Struct, frozen=True):
    """What docker reports about itself."""

    is_installed: bool
    problem: str = ""  # why the engine does not answer: permission, stopped, late or other
    detail: str = ""
    engine: str = ""
    compose: str = ""
    os_type: str = ""  # of the containers: linux or windows
    is_desktop: bool = False
    memory_bytes: int = 0  # available to all containers together
    root_dir: str = ""
    runtimes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()  # CDI


def gather_docker(run: Run) -> DockerFacts:
    ran = run(["docker", "info", "--format", "{{json .}}"], DOCKER_SECONDS)
    if ran.is_missing:
        return DockerFacts(is_installed=False)
    compose = run(["docker", "compose", "version", "--short"], DOCKER_SECONDS)
    compose_version = compose.output.strip() if compose.is_good else ""
    info = _object(ran.output)
    if not ran.is_good or not info.get("ServerVersion"):
        problem, detail = engine_problem(ran, info)
        return DockerFacts(is_installed=True, problem=problem, detail=detail, compose=compose_version)
    return DockerFacts(
        is_installed=True,
        engine=str(info["ServerVersion"]),
        compose=compose_version,
        os_type=str(info.get("OSType", "")),
        is_desktop="Docker Desktop" in str(info.get("OperatingSystem", "")),
        memory_bytes=int(info.get("MemTotal") or 0),
        root_dir=str(info.get("DockerRootDir") or ""),
        runtimes=tuple(info.get("Runtimes") or ()),
        devices=tuple(str(each.get("ID", "")) for each in info.get("DiscoveredDevices") or ()),
    )


def engine_problem(ran: Ran, info: dict[str, Any]) -> tuple[str, str]:
    """Return why the engine did not answer: one word, and its own message."""
    message = " ".join([ran.errors, *map(str, info.get("ServerErrors") or ())])
    if ran.is_late:
        return "late", f"no answer in {DOCKER_SECONDS:.0f} s"
    if re.search(r"permission denied|access is denied", message, re.IGNORECASE):
        return "permission", ran.last_line
    if re.search(r"cannot connect|is the docker daemon running|error during connect|failed to connect", message, re.I):
        return "stopped", ran.last_line
    return "other", message.strip()[-300:] or ran.last_line


def check_docker(facts: DockerFacts, where: str, system: System, *, is_needed: bool) -> list[CheckResult]:
    """Judge engine and compose; if noodle runs without Docker here (`noodle up`), its faults are no findings."""
    if facts.is_installed:
        results = [_check_engine(facts, where, system), _check_compose(facts, where, system)]
    else:
        results = [error("docker", where, "Docker is not installed.", why=WHY_ENGINE, cure=INSTALL[system])]
    if not is_needed and any(result.status == "error" for result in results):
        return [skipped("docker", where, "noodle runs without Docker here, and Docker cannot be used")]
    return results


def _check_engine(facts: DockerFacts, where: str, system: System) -> CheckResult:
    if facts.problem == "permission":
        what = "This user may not use the Docker engine (permission denied on its socket)."
        return error("docker", where, what, why="no container can be started without it", cure=PERMIT[system])
    if facts.problem in ("stopped", "late"):
        what = f"The Docker engine does not answer: {facts.detail}."
        return error("docker", where, what, why=WHY_ENGINE, cure=START[system])
    if facts.problem:
        return error("docker", where, f"Docker refuses: {facts.detail}.", why=WHY_ENGINE, cure=START[system])
    if facts.os_type == "windows":
        cure = '& "$Env:ProgramFiles\\Docker\\Docker\\DockerCli.exe" -SwitchLinuxEngine'
        return error("docker", where, "Docker runs Windows containers.", why="noodle's images are Linux", cure=cure)
    if version_of(facts.engine) < OLDEST_ENGINE:
        what = f"The Docker engine is {facts.engine}, older than {'.'.join(map(str, OLDEST_ENGINE))}."
        return error("docker", where, what, why="the images need BuildKit", cure=INSTALL[system])
    return ok("docker", where, f"engine {facts.engine}{', Docker Desktop' if facts.is_desktop else ''}")


def _check_compose(facts: DockerFacts, where: str, system: System) -> CheckResult:
    why = "docker-compose.yml needs compose 2.20 or later"
    if not facts.compose:
        what = "`docker compose` is not installed (the old docker-compose is not enough)."
        return error("compose", where, what, why=why, cure=UPGRADE_COMPOSE[system])
    version = version_of(facts.compose)
    if not version:
        what = f"compose reports the version {facts.compose!r}."
        return warning("compose", where, what, why=why, cure=UPGRADE_COMPOSE[system])
    if version < OLDEST_COMPOSE:
        what = f"compose is {facts.compose}, older than {'.'.join(map(str, OLDEST_COMPOSE))}."
        return error("compose", where, what, why=why, cure=UPGRADE_COMPOSE[system])
    return ok("compose", where, f"compose {facts.compose}")


def version_of(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, () if it is not one."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else ()


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}
