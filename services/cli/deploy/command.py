"""`noodle deploy`: both machines from here. Copies to B and starts B's set, starts A's set, waits, verifies, reports.

Running it again is harmless: files are replaced, settings and secrets stay, containers that need no change run on.
What a step needs to know of machine B is in deploy_machine_b.py, of this one in deploy_machine_a.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from noodle.errors import ConfigurationError
from services.cli.deploy.machine_a import MachineA, prepare_project
from services.cli.deploy.machine_b import MachineB
from services.cli.deploy.ssh import Remote, system_of
from services.cli.project.join_line import encode
from services.cli.project.programs import System, this_system

DEFAULT_FOLDER = "noodle"
RESULTS_NAME = "deploy-results"


@dataclass(frozen=True)
class DeployWish:
    """The options of `noodle deploy`."""

    remote: Remote
    address: str | None  # of this machine
    remote_system: System | None  # None: ask it
    there: str
    is_verified: bool = True


def deploy(wish: DeployWish, folder: Path) -> int:
    """0 when both machines work together; `noodle verify`'s code when it finds a difference. Raises NoodleError."""
    here = this_system()
    machine_a = MachineA(folder, _said("A"))
    step(f"Docker here: {machine_a.check(here)}")
    system = wish.remote_system or system_of(wish.remote, here)
    step(f"{wish.remote.host} answers: {system}")
    if system == "other":
        raise ConfigurationError(f"{wish.remote.host} runs neither Linux nor Windows.")
    if system == "windows":
        project = prepare_project(folder, wish.address, wish.remote.host, here)
        print(by_hand_on_windows(encode(machine_a.join(project)), wish.remote.host, project.lan_address))
        step("Starting machine A's set here; B may be started before or after")
        machine_a.start()
        return _finish(machine_a, None, wish)
    machine_b = MachineB(wish.remote, wish.there, _said("B"))
    step(f"Docker there: {machine_b.check()}")
    project = prepare_project(folder, wish.address, wish.remote.host, here)
    step(f"This machine is {project.machine} at {project.lan_address}")
    step(f"Copied to {wish.remote.name}:{wish.there}: {machine_b.copy(folder)}")
    step("Building and starting machine B's set (the first time takes minutes)")
    machine_b.initialise(machine_a.join(project), project.peer_address)
    machine_b.start()
    step("Building and starting machine A's set")
    machine_a.start()
    return _finish(machine_a, machine_b, wish)


def stop(wish: DeployWish, folder: Path) -> int:
    """Take both sets down; volumes, settings and secrets stay."""
    here = this_system()
    machine_a = MachineA(folder, _said("A"))
    step(f"Machine A: {machine_a.stop()}")
    system = wish.remote_system or system_of(wish.remote, here)
    if system == "windows":
        step(f"On {wish.remote.host}, in noodle's folder: docker compose down")
        return 0
    step(f"Machine B: {MachineB(wish.remote, wish.there, _said('B')).stop()}")
    return 0


def _finish(machine_a: MachineA, machine_b: MachineB | None, wish: DeployWish) -> int:
    results = machine_a.folder / RESULTS_NAME / time.strftime("%Y-%m-%d-%H%M%S")
    results.mkdir(parents=True)
    try:
        step("Waiting until both are ready")
        machine_a.wait_until_ready()
        code = 0
        if wish.is_verified:
            step("Comparing tokens with the unsplit model (noodle verify)")
            code = machine_a.verify(results / "verify.json")
    finally:
        (results / "machine-a.log").write_text(machine_a.logs(), encoding="utf-8")
        if machine_b is not None:
            (results / "machine-b.log").write_text(machine_b.logs(), encoding="utf-8")
        print(f"Logs of both machines and the report: {results}")
    print(machine_a.urls())
    return code


def by_hand_on_windows(join_text: str, host: str, address_of_a: str) -> str:
    """What to run on a Windows machine B, where Docker Desktop belongs to whoever is logged in."""
    return "\n".join(
        [
            f"{host} is a Windows machine. On it, in PowerShell, in its own copy of this folder (the same version):",
            f"    Test-NetConnection {address_of_a} -Port 8080",
            f"    docker compose run --rm init --machine b --address {host} --join {join_text}",
            "    docker compose up --detach --build",
            "    deploy\\firewall.ps1 -Apply      (as administrator)",
            "The join line holds secrets of this cluster.",
        ]
    )


def step(text: str) -> None:
    """A line that stays."""
    print(f"== {text}", flush=True)


def _said(machine: str) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"   {machine} | {line}", file=sys.stderr, flush=True)

    return say
