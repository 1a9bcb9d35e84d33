"""The two machines of `noodle deploy`: A is this folder, B is reached by ssh."""

from __future__ import annotations

import contextlib
import io
import shlex
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from noodle.errors import ConfigurationError, NotReady, StartError
from services.cli.client.health import Health, ask_health
from services.cli.client.progress import open_progress
from services.cli.commands.init import prepare
from services.cli.deploy import copy
from services.cli.deploy.ssh import Remote, ssh_problem
from services.cli.doctor.docker import DockerFacts, check_docker, gather_docker
from services.cli.project.join_line import Join, encode
from services.cli.project.machine_settings import InitOptions
from services.cli.project.programs import Ran, System, follow_program, is_wsl, run_program
from services.cli.project.project import Project, find_project, require_project

MARKER = ".noodle-deployed"  # marks a folder on B that deploy made, and so may replace
COPY_SECONDS = 300.0  # copying the files to B
SHORT_SECONDS = 60.0  # one short command on B
BUILD_SECONDS = 3600.0  # building and starting one machine; the first time downloads torch
INIT_SECONDS = 600.0  # writing B's settings
DOWN_SECONDS = 180.0  # stopping one machine
LOG_SECONDS = 60.0  # reading one machine's logs
LOG_LINES = 2000
READY_LOOK_SECONDS = 1.0  # between two looks at the coordinator's health
STALLED_SECONDS = 900.0  # without any change, after which a start is given up
VERIFY_SECONDS = 3600.0  # `noodle verify`
VERIFY_PROMPTS = 8  # enough to notice a wrong cut or wrong weights; `noodle verify` alone uses all
VERIFY_SERVICE = "stage-0"  # its image has torch


class Machine(ABC):
    """A folder of noodle on one machine, and where to look after a failure there."""

    def __init__(self, name: str, cure: str) -> None:
        self.name, self.cure = name, cure

    @abstractmethod
    def compose(self, arguments: Sequence[str], seconds: float) -> Ran:
        """Run `docker compose` in the folder and return its output."""

    @abstractmethod
    def follow_compose(self, arguments: Sequence[str], seconds: float, sent: bytes = b"") -> Ran:
        """Run `docker compose` in the folder and log its lines."""

    def start(self) -> None:
        self.must(self.follow_compose(["up", "--detach", "--build"], BUILD_SECONDS), "the containers could not start")

    def stop(self) -> str:
        """Stop the containers and return what was done; raises StartError."""
        self.must(self.follow_compose(["down"], DOWN_SECONDS), "the containers could not be stopped")
        return "stopped"

    def logs(self) -> str:
        """Return the newest lines of the containers, or why there are none."""
        ran = self.compose(["logs", "--no-color", "--tail", str(LOG_LINES)], LOG_SECONDS)
        return ran.output if ran.is_good else f"the logs could not be read: {ran.last_line}\n"

    def must(self, ran: Ran, problem: str) -> None:
        if not ran.is_good:
            reason = "it took too long" if ran.is_late else ran.last_line
            raise StartError(f"On {self.name} {problem}: {reason}", cure=self.cure)


def docker_in_words(facts: DockerFacts, machine: str, system: System, cure_prefix: str = "") -> str:
    """Return the state of Docker; raises StartError for a finding, with its cure."""
    results = check_docker(facts, machine, system, is_needed=True)
    for result in results:
        if result.status == "error":
            raise StartError(f"On {machine}: {result.what}", cure=f"{cure_prefix}{result.cure}")
    return ", ".join(result.what for result in results)


class MachineA(Machine):
    """This folder on this machine."""

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        super().__init__("this machine", "See the lines above, and `noodle doctor`.")
        self.folder, self._log = folder, log

    def compose(self, arguments: Sequence[str], seconds: float) -> Ran:
        return run_program(["docker", "compose", *arguments], seconds, folder=self.folder)

    def follow_compose(self, arguments: Sequence[str], seconds: float, sent: bytes = b"") -> Ran:
        return follow_program(["docker", "compose", *arguments], seconds, self._log, folder=self.folder, sent=sent)

    def check(self, system: System) -> str:
        """Return the state of Docker here; raises StartError."""
        return docker_in_words(gather_docker(run_program), self.name, system)

    def stop(self) -> str:
        return super().stop() if find_project(self.folder) is not None else "nothing to stop"

    def wait_until_ready(self) -> None:
        """Wait for the coordinator and show what it waits for; raises StartError or NotReady if nothing changes."""
        project = require_project(self.folder)
        token = project.secret("cluster_token")
        seen: Health | None = None
        changed_at = time.monotonic()
        with contextlib.closing(open_progress(sys.stderr)) as progress:
            while True:
                health = ask_health(project.coordinator_url, token)
                if health.status == "ready":
                    return
                if health.status == "failed":
                    raise StartError(
                        f"The coordinator has failed: {health.text()}", cure="See the logs, and `noodle doctor`."
                    )
                if seen is None or (health.status, health.detail) != (seen.status, seen.detail):
                    seen, changed_at = health, time.monotonic()
                if time.monotonic() - changed_at > STALLED_SECONDS:
                    raise NotReady(
                        f"Nothing has changed for {STALLED_SECONDS:.0f} seconds: {health.text()}.",
                        cure="Run `noodle doctor` on both machines.",
                    )
                progress.show("ready", health.text(), health.progress)
                time.sleep(READY_LOOK_SECONDS)  # the polling interval

    def verify(self, report_path: Path) -> int:
        """Run `noodle verify` in the stage's image, keep its report, and return its exit code."""
        model = require_project(self.folder).values.get("NOODLE_MODEL", "")
        arguments = ["run", "--rm", "--no-deps", "-T", "--entrypoint", "noodle", "-e", f"NOODLE_MODEL={model}"]
        arguments += ["--volume", f"{self.folder / 'models'}:/models:ro", VERIFY_SERVICE, "verify", "--json"]
        arguments += ["--prompts", str(VERIFY_PROMPTS)]
        ran = self.compose(arguments, VERIFY_SECONDS)
        report_path.write_text(ran.output, encoding="utf-8")
        if ran.code not in (0, 1) or not ran.output.lstrip().startswith("{"):
            raise StartError(
                f"`noodle verify` could not run: {ran.last_line}", cure="See the logs, and `noodle doctor`."
            )
        print("   The split changes nothing beyond rounding." if ran.code == 0 else f"   Tokens differ: {report_path}")
        return ran.code

    def urls(self) -> str:
        project = require_project(self.folder)
        grafana = f"http://{project.lan_address}:{project.port('NOODLE_GRAFANA_PORT')}"
        return "\n".join(
            [
                f"Ready: {project.coordinator_url}/v1   (key: secrets/api_key)",
                f"       {project.coordinator_url}/health",
                f"       {grafana}   (Grafana: user admin, password in secrets/grafana_password)",
            ]
        )


class MachineB(Machine):
    """A folder on the remote machine."""

    def __init__(self, remote: Remote, folder: str, log: Callable[[str], None]) -> None:
        cure = f"Look there: ssh {remote.name}, then cd {folder}"
        super().__init__(remote.host, cure)
        self._remote, self._folder, self._quoted, self._log = remote, folder, shlex.quote(folder), log

    def compose(self, arguments: Sequence[str], seconds: float) -> Ran:
        return self._remote.shell(self._compose_script(arguments), seconds)

    def follow_compose(self, arguments: Sequence[str], seconds: float, sent: bytes = b"") -> Ran:
        return self._remote.follow(self._compose_script(arguments), seconds, self._log, sent)

    def _compose_script(self, arguments: Sequence[str]) -> str:
        return f"cd {self._quoted} && docker compose {shlex.join(arguments)}"

    def check(self) -> str:
        """Return the state of Docker there; raises StartError."""
        return docker_in_words(gather_docker(self._remote.run), self.name, "linux", "There: ")

    def stop(self) -> str:
        found = self._remote.shell(f"test -e {self._quoted}/docker-compose.yml", SHORT_SECONDS)
        if not found.is_good and ssh_problem(found) is None:
            return "nothing to stop"
        return super().stop()

    def copy(self, source: Path) -> str:
        """Replace the files there by this folder's and return how much was copied. Raises StartError."""
        names = copy.files_to_copy(source)
        content = copy.tar_of(source, names)
        replaced = " ".join(shlex.quote(name) for name in copy.top_folders(names))
        script = (
            f"set -e; mkdir -p {self._quoted}; cd {self._quoted}; "
            f'if [ ! -e {MARKER} ] && [ -n "$(ls -A)" ]; then echo not-ours; exit 9; fi; '
            f"touch {MARKER}; rm -rf -- {replaced}; tar -xzf -"
        )
        ran = self._remote.follow(script, COPY_SECONDS, self._log, content)
        if "not-ours" in ran.output:
            raise ConfigurationError(
                f"{self._folder} on {self.name} holds files that no deploy put there.",
                cure="Give another folder with --there, or empty that one.",
            )
        self.must(ran, "the files could not be copied")
        return f"{len(names)} files, {len(content) / 1e6:.1f} MB"

    def initialise(self, join: Join, address: str) -> None:
        """Write .env and secrets there, in B's own control image; the join line goes through standard input."""
        self.must(self.follow_compose(["build", "init"], BUILD_SECONDS), "the control image could not be built")
        arguments = ["run", "--rm", "-T", "init", "--machine", "b", "--join", "-", "--address", address]
        ran = self.follow_compose(arguments, INIT_SECONDS, encode(join).encode())
        self.must(ran, "the settings could not be written")


def prepare_project(folder: Path, address: str | None, peer: str, here: System) -> Project:
    """Return this folder as machine A with the given B; its .env is written unless it already says so."""
    peer_address = _address_of(peer)
    project = find_project(folder)
    is_same = project is not None and project.role == "a" and project.peer_address == peer_address
    if project is not None and is_same and address in (None, project.lan_address):
        return project
    if project is None and address is None:
        address = _address_towards(peer_address, here)
    with contextlib.redirect_stdout(io.StringIO()):  # the next steps that it prints are those of deploy
        prepare(folder, InitOptions(machine="a", address=address, peer=peer_address), None)
    return require_project(folder)


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"The name {host!r} does not resolve here.", cure="Give an IP address.") from error


def _address_towards(peer: str, here: System) -> str:
    """Return this machine's address towards another one, from the system's routes; sends no packet."""
    if here == "linux" and is_wsl():
        raise ConfigurationError(
            "WSL has its own address behind Windows, so this machine's address is unknown here.",
            cure="Give the Windows machine's address: --address 192.168.1.101 (`ipconfig` shows it).",
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError as error:
            raise ConfigurationError(
                f"This machine has no route to {peer} ({error.strerror}).",
                cure="Check that both are on one network, or give --address.",
            ) from error
        return str(probe.getsockname()[0])
