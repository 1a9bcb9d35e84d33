"""Machine A for `noodle deploy`: this folder's settings, containers, readiness, verify and logs; asks nobody else."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from noodle import __version__
from noodle.errors import ConfigurationError, NotReady, StartError
from services.cli.client.health import Health, ask_health
from services.cli.client.progress import open_progress
from services.cli.commands.init import init
from services.cli.doctor.addresses import resolve
from services.cli.doctor.docker import check_docker, gather_docker
from services.cli.project.join_line import Join
from services.cli.project.machine_settings import Wish
from services.cli.project.programs import Ran, System, follow_program, is_wsl, run_program
from services.cli.project.project import Project, find_project, require_project

BUILD_SECONDS = 3600.0
DOWN_SECONDS = 180.0
LOG_SECONDS = 60.0
LOG_LINES = 2000
READY_LOOK_SECONDS = 1.0
STALLED_SECONDS = 900.0  # nothing at all changed for so long: it will not become ready
VERIFY_SECONDS = 3600.0
VERIFY_PROMPTS = 8  # enough to see a wrong cut or wrong weights; `noodle verify` alone asks all
VERIFY_SERVICE = "stage-0"  # its image has torch


@dataclass
class MachineA:
    """One folder on this machine."""

    folder: Path
    say: Callable[[str], None]

    def check(self, system: System) -> str:
        """Docker here, in words; raises StartError with the finding and its cure."""
        outcomes = check_docker(gather_docker(run_program), "this machine", system, is_needed=True)
        for outcome in outcomes:
            if outcome.status == "error":
                raise StartError(f"On this machine: {outcome.what}", cure=outcome.cure)
        return ", ".join(outcome.what for outcome in outcomes)

    def join(self, project: Project) -> Join:
        """What B must know."""
        return Join(
            noodle_version=__version__,
            machine=project.machine,
            address=project.lan_address,
            coordinator_port=project.port("NOODLE_COORDINATOR_PORT"),
            valkey_port=project.port("NOODLE_VALKEY_PORT"),
            peer_address=project.peer_address,
            cluster_token=project.secret("cluster_token"),
            valkey_password=project.secret("valkey_password"),
        )

    def start(self) -> None:
        """Build and start the set of this machine."""
        ran = self._compose(["up", "--detach", "--build"], BUILD_SECONDS)
        _must(ran, "Machine A's set could not be started")

    def stop(self) -> str:
        """Take it down; says so when there is nothing to take down."""
        if find_project(self.folder) is None:
            return "nothing was started here"
        _must(self._compose(["down"], DOWN_SECONDS), "Machine A's set could not be stopped")
        return "stopped"

    def wait_until_ready(self) -> None:
        """Wait for the coordinator, showing what it waits for; raises StartError when it fails or nothing moves."""
        project = require_project(self.folder)
        token = project.secret("cluster_token")
        progress = open_progress(sys.stderr)
        seen: Health | None = None
        changed_at = time.monotonic()
        try:
            while True:
                health = ask_health(project.coordinator_url, token)
                if health.status == "ready":
                    progress.finish("ready", "")
                    return
                if health.status == "failed":
                    raise StartError(
                        f"The coordinator has failed: {health.text()}", cure="See the logs, and `noodle doctor`."
                    )
                if seen is None or (health.status, health.detail) != (seen.status, seen.detail):
                    seen, changed_at = health, time.monotonic()
                if time.monotonic() - changed_at > STALLED_SECONDS:
                    raise NotReady(
                        f"Nothing has moved for {STALLED_SECONDS:.0f} seconds: {health.text()}.",
                        cure="Run `noodle doctor` on both machines.",
                    )
                progress.show("ready", health.text(), health.progress)
                time.sleep(READY_LOOK_SECONDS)  # the interval of looking
        finally:
            progress.close()

    def verify(self, report_path: Path) -> int:
        """Run `noodle verify` in the stage's image, keep its report; gives its exit code."""
        project = require_project(self.folder)
        model = project.values.get("NOODLE_MODEL", "")
        arguments = ["run", "--rm", "--no-deps", "-T", "--entrypoint", "noodle", "-e", f"NOODLE_MODEL={model}"]
        arguments += ["--volume", f"{self.folder / 'models'}:/models:ro", VERIFY_SERVICE, "verify", "--json"]
        arguments += ["--prompts", str(VERIFY_PROMPTS)]
        ran = run_program(["docker", "compose", *arguments], VERIFY_SECONDS, folder=self.folder)
        report_path.write_text(ran.output, encoding="utf-8")
        if ran.code not in (0, 1) or not ran.output.lstrip().startswith("{"):
            raise StartError(f"`noodle verify` could not be run: {ran.said}", cure="See the logs, and `noodle doctor`.")
        print("   The split changes nothing beyond rounding." if ran.code == 0 else f"   Tokens differ: {report_path}")
        return ran.code

    def logs(self) -> str:
        """The newest lines of this machine's containers, or why there are none."""
        arguments = ["docker", "compose", "logs", "--no-color", "--tail", str(LOG_LINES)]
        ran = run_program(arguments, LOG_SECONDS, folder=self.folder)
        return ran.output if ran.is_good else f"the logs could not be had: {ran.said}\n"

    def urls(self) -> str:
        """Where things are."""
        project = require_project(self.folder)
        grafana = f"http://{project.lan_address}:{project.port('NOODLE_GRAFANA_PORT')}"
        return "\n".join(
            [
                f"Ready: {project.coordinator_url}/v1   (key: secrets/api_key)",
                f"       {project.coordinator_url}/health",
                f"       {grafana}   (Grafana: admin, secrets/grafana_password)",
            ]
        )

    def _compose(self, arguments: Sequence[str], seconds: float) -> Ran:
        return follow_program(["docker", "compose", *arguments], seconds, self.say, folder=self.folder)


def prepare_project(folder: Path, address: str | None, peer: str, here: System) -> Project:
    """This folder as machine A with that B: made where there is no .env yet, kept where it says the same."""
    peer_address = _address_of(peer)
    project = find_project(folder)
    is_same = project is not None and project.role == "a" and project.peer_address == peer_address
    if project is not None and is_same and address in (None, project.lan_address):
        return project
    if project is None and address is None:
        address = _address_towards(peer_address, here)
    with contextlib.redirect_stdout(io.StringIO()):  # what it says comes next is what is done here
        init(folder, Wish(machine="a", address=address, peer=peer_address), None)
    return require_project(folder)


def _address_of(host: str) -> str:
    """The IPv4 address of a host, which is what the other side is configured with."""
    try:
        resolve(host)
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigurationError(f"The name {host!r} does not resolve here.", cure="Give an IP address.") from error


def _address_towards(peer: str, here: System) -> str:
    """The address from which this machine talks to the other one; the system's routes say it, no packet is sent."""
    if here == "linux" and is_wsl():
        raise ConfigurationError(
            "WSL has an address of its own behind Windows, so this machine's can not be told from here.",
            cure="Give the Windows machine's address: --address 192.168.1.101 (`ipconfig` shows it).",
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError as error:
            raise ConfigurationError(
                f"This machine knows no way to {peer} ({error.strerror}).",
                cure="Are both on one network? Else give --address.",
            ) from error
        return str(probe.getsockname()[0])


def _must(ran: Ran, what: str) -> None:
    if not ran.is_good:
        reason = "it took too long" if ran.is_late else ran.said
        raise StartError(f"{what}: {reason}", cure="See the lines above, and `noodle doctor`.")
