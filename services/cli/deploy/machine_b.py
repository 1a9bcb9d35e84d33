"""Machine B for `noodle deploy`: files, .env and secrets, containers and their logs there; all of it by ssh."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from noodle.errors import ConfigurationError, StartError
from services.cli.deploy import copy
from services.cli.deploy.ssh import Remote, ssh_problem
from services.cli.doctor.docker import check_docker, gather_docker
from services.cli.project.join_line import Join, encode
from services.cli.project.programs import Ran

MARKER = ".noodle-deployed"  # in a folder that may be replaced, because a deploy made it
COPY_SECONDS = 300.0
SHORT_SECONDS = 60.0
BUILD_SECONDS = 3600.0  # the first time fetches torch
UP_SECONDS = 600.0
DOWN_SECONDS = 180.0
LOG_SECONDS = 60.0
LOG_LINES = 2000


class MachineB:
    """One folder on another machine."""

    def __init__(self, remote: Remote, folder: str, say: Callable[[str], None]) -> None:
        self._remote, self._folder, self._say = remote, folder, say

    def check(self) -> str:
        """Docker there, in words; raises StartError with the finding and its cure."""
        facts = gather_docker(self._remote.run)
        outcomes = check_docker(facts, self._remote.host, "linux", is_needed=True)
        for outcome in outcomes:
            if outcome.status == "error":
                raise StartError(f"On {self._remote.host}: {outcome.what}", cure=f"There: {outcome.cure}")
        return ", ".join(outcome.what for outcome in outcomes)

    def copy(self, source: Path) -> str:
        """Bring the files there, in place of older ones; says how much. Raises StartError."""
        names = copy.files_to_copy(source)
        content = copy.tar_of(source, names)
        replaced = " ".join(shlex.quote(name) for name in copy.top_folders(names))
        script = (
            f"set -e; mkdir -p {self._quoted}; cd {self._quoted}; "
            f'if [ ! -e {MARKER} ] && [ -n "$(ls -A)" ]; then echo not-ours; exit 9; fi; '
            f"touch {MARKER}; rm -rf -- {replaced}; tar -xzf -"
        )
        ran = self._remote.follow(script, COPY_SECONDS, self._say, content)
        if "not-ours" in ran.output:
            raise ConfigurationError(
                f"{self._folder} on {self._remote.host} holds files that no deploy brought there.",
                cure="Give another folder with --there, or empty that one.",
            )
        self._must(ran, "The files could not be copied")
        return f"{len(names)} files, {len(content) / 1e6:.1f} MB"

    def initialise(self, join: Join, address: str) -> None:
        """Write .env and secrets there, in B's own control image; the join line goes by standard input."""
        self._compose("build init", BUILD_SECONDS, "The control image could not be built")
        arguments = f"run --rm -T init --machine b --join - --address {shlex.quote(address)}"
        self._compose(arguments, UP_SECONDS, "B's settings could not be written", encode(join).encode())

    def start(self) -> None:
        """Build and start B's set."""
        self._compose("up --detach --build", BUILD_SECONDS, "B's set could not be started")

    def stop(self) -> str:
        """Take it down; says so when there is nothing to take down."""
        there = self._remote.shell(f"test -e {self._quoted}/docker-compose.yml", SHORT_SECONDS)
        if ssh_problem(there) is None and not there.is_good:
            return "nothing was deployed there"
        self._compose("down", DOWN_SECONDS, "B's set could not be stopped")
        return "stopped"

    def logs(self) -> str:
        """The newest lines of B's containers, or why there are none."""
        ran = self._remote.shell(self._script(f"logs --no-color --tail {LOG_LINES}"), LOG_SECONDS)
        return ran.output if ran.is_good else f"the logs could not be had: {ran.said}\n"

    def _compose(self, arguments: str, seconds: float, what: str, sent: bytes = b"") -> None:
        self._must(self._remote.follow(self._script(arguments), seconds, self._say, sent), what)

    def _script(self, arguments: str) -> str:
        return f"cd {self._quoted} && docker compose {arguments}"

    @property
    def _quoted(self) -> str:
        return shlex.quote(self._folder)

    def _must(self, ran: Ran, what: str) -> None:
        if ran.is_good:
            return
        reason = "it took too long" if ran.is_late else ran.said
        raise StartError(
            f"{what} on {self._remote.host}: {reason}",
            cure=f"ssh {self._remote.name}, then cd {self._folder} and look.",
        )
