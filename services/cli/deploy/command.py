"""`noodle deploy`: copies noodle to machine B, starts B and A, waits, verifies and reports.

Safe to run again: files are replaced, settings and secrets stay, and unchanged containers keep running.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from noodle.errors import ConfigurationError
from services.cli.commands.init import join_of
from services.cli.deploy.machines import MachineA, MachineB, prepare_project
from services.cli.deploy.ssh import Remote, system_of
from services.cli.project.join_line import encode
from services.cli.project.programs import this_system

RESULTS_NAME = "deploy-results"


def deploy(options: argparse.Namespace) -> int:
    """Return 0 if both machines work together, or `noodle verify`'s code if tokens differ. Raises NoodleError."""
    if options.stop and options.no_verify:
        raise ConfigurationError("--no-verify means nothing with --stop.", cure="Leave it out.")
    config_path = Path(options.ssh_config) if options.ssh_config else None
    remote = Remote(options.remote, options.user, config_path)
    machine_a = MachineA(Path.cwd(), _logger("A"))
    machine_b = MachineB(remote, options.there, _logger("B"))
    if options.stop:
        return _stop(machine_a, machine_b, remote, options)
    here = this_system()
    _step(f"Docker here: {machine_a.check(here)}")
    system = options.remote_os or system_of(remote, here)
    _step(f"{remote.host} answers: {system}")
    if system == "other":
        raise ConfigurationError(f"{remote.host} runs neither Linux nor Windows.")
    if system == "windows":
        project = prepare_project(machine_a.folder, options.address, remote.host, here)
        print(by_hand_on_windows(encode(join_of(project)), remote.host, project.lan_address))
        _step("Starting machine A here; B may start before or after it")
        machine_a.start()
        return _finish(machine_a, None, is_verified=not options.no_verify)
    _step(f"Docker there: {machine_b.check()}")
    project = prepare_project(machine_a.folder, options.address, remote.host, here)
    _step(f"This machine is {project.machine} at {project.lan_address}")
    _step(f"Copied to {remote.name}:{options.there}: {machine_b.copy(machine_a.folder)}")
    _step("Building and starting machine B (the first time takes minutes)")
    machine_b.initialise(join_of(project), project.peer_address)
    machine_b.start()
    _step("Building and starting machine A")
    machine_a.start()
    return _finish(machine_a, machine_b, is_verified=not options.no_verify)


def _stop(machine_a: MachineA, machine_b: MachineB, remote: Remote, options: argparse.Namespace) -> int:
    _step(f"Machine A: {machine_a.stop()}")
    if (options.remote_os or system_of(remote, this_system())) == "windows":
        _step(f"Run on {remote.host}, in noodle's folder: docker compose down")
    else:
        _step(f"Machine B: {machine_b.stop()}")
    return 0


def _finish(machine_a: MachineA, machine_b: MachineB | None, *, is_verified: bool) -> int:
    results = machine_a.folder / RESULTS_NAME / time.strftime("%Y-%m-%d-%H%M%S")
    results.mkdir(parents=True)
    code = 0
    try:
        _step("Waiting until both are ready")
        machine_a.wait_until_ready()
        if is_verified:
            _step("Comparing tokens with the unsplit model (noodle verify)")
            code = machine_a.verify(results / "verify.json")
    finally:
        (results / "machine-a.log").write_text(machine_a.logs(), encoding="utf-8")
        if machine_b is not None:
            (results / "machine-b.log").write_text(machine_b.logs(), encoding="utf-8")
        print(f"Logs of both machines and the report: {results}")
    print(machine_a.urls())
    return code


def by_hand_on_windows(join_text: str, host: str, address_of_a: str) -> str:
    """Return what to run on a Windows machine B, where Docker Desktop belongs to the user who is logged in."""
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


def _step(text: str) -> None:
    print(f"== {text}", flush=True)


def _logger(machine: str) -> Callable[[str], None]:
    def log(line: str) -> None:
        print(f"   {machine} | {line}", file=sys.stderr, flush=True)

    return log
