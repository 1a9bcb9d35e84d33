"""The project folder as `noodle init` left it: .env, secrets, and which ports that makes this machine publish.

Reads files and decides by their values; starts nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from noodle.errors import ConfigurationError
from services.cli.project.env_file import read_values

ENV_NAME = ".env"
COMPOSE_NAME = "docker-compose.yml"
SECRETS_NAME = "secrets"
ROLES = ("single", "a", "b")
LOOPBACK = "127.0.0.1"
DEFAULT_PORTS = {
    "NOODLE_COORDINATOR_PORT": 8080,
    "NOODLE_VALKEY_PORT": 6379,
    "NOODLE_STAGE_0_PORT": 8081,
    "NOODLE_STAGE_1_PORT": 8081,
    "NOODLE_GRAFANA_PORT": 3000,
}
SECOND_STAGE_ON_ONE_MACHINE = 8082

Role = Literal["single", "a", "b"]
Readers = Literal["machine", "people"]  # the other machine's services; or people with a browser or a client


@dataclass(frozen=True)
class Published:
    """A port that this machine opens to the network, and for whom."""

    service: str  # as compose names it
    variable: str
    port: int
    readers: tuple[Readers, ...]


@dataclass(frozen=True)
class Project:
    """One machine's part of the cluster."""

    folder: Path
    role: Role
    values: Mapping[str, str] = field(repr=False)

    @property
    def lan_address(self) -> str:
        """This machine's address, under which its ports are published."""
        return self.values.get("NOODLE_LAN_ADDRESS") or LOOPBACK

    @property
    def peer_address(self) -> str:
        """The other machine's address, empty when there is none."""
        return self.values.get("NOODLE_PEER_ADDRESS", "")

    @property
    def machine(self) -> str:
        """The name of this machine."""
        default = "machine-b" if self.role == "b" else "machine-a"
        return self.values.get("NOODLE_MACHINE") or default

    @property
    def coordinator_url(self) -> str:
        """Where this machine finds the coordinator."""
        if self.role == "b":
            return self.values.get("NOODLE_COORDINATOR_URL") or f"http://{self.peer_address}:{DEFAULT_COORDINATOR}"
        return f"http://{self.lan_address}:{self.port('NOODLE_COORDINATOR_PORT')}"

    @property
    def valkey_url(self) -> str:
        """Where this machine finds Valkey."""
        if self.role == "b":
            return self.values.get("NOODLE_VALKEY_URL") or f"redis://noodle@{self.peer_address}:{DEFAULT_VALKEY}"
        return f"redis://noodle@{self.lan_address}:{self.port('NOODLE_VALKEY_PORT')}"

    @property
    def compose_files(self) -> list[str]:
        """The compose files that make this machine's set."""
        separator = self.values.get("COMPOSE_PATH_SEPARATOR") or ":"
        return [name for name in self.values.get("COMPOSE_FILE", COMPOSE_NAME).split(separator) if name]

    def port(self, variable: str) -> int:
        """A published port; raises ConfigurationError for what is none."""
        default = DEFAULT_PORTS[variable]
        if variable == "NOODLE_STAGE_1_PORT" and self.role == "single":
            default = SECOND_STAGE_ON_ONE_MACHINE
        text = self.values.get(variable) or str(default)
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise ConfigurationError(
                f"{variable} in {self.folder / ENV_NAME} is {text!r}, which is no port.", cure="Write 1 to 65535."
            )
        return int(text)

    def published(self) -> list[Published]:
        """The ports that this machine's set opens."""
        both: tuple[Readers, ...] = ("machine", "people")
        first_stage = self._published("stage-0", "NOODLE_STAGE_0_PORT", ("machine",))
        second_stage = self._published("stage-1", "NOODLE_STAGE_1_PORT", ("machine",))
        if self.role == "b":
            return [second_stage]
        ports = [
            self._published("coordinator", "NOODLE_COORDINATOR_PORT", both),
            self._published("valkey", "NOODLE_VALKEY_PORT", ("machine",)),
            first_stage,
        ]
        if self.role == "single":
            ports.append(second_stage)
        return [*ports, self._published("grafana", "NOODLE_GRAFANA_PORT", ("people",))]

    def secret(self, name: str) -> str:
        """One of the files of secrets; raises ConfigurationError when it can not be read or is empty."""
        path = self.folder / SECRETS_NAME / name
        again = "Run `docker compose run --rm init` (or `noodle init`) again: it keeps what is there."
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except PermissionError as error:
            raise ConfigurationError(
                f"{path} may not be read by this user.", cure="Run this command with sudo, or as the file's owner."
            ) from error
        except OSError as error:
            raise ConfigurationError(f"{path} can not be read ({error.strerror}).", cure=again) from error
        if not secret:
            raise ConfigurationError(f"{path} is empty.", cure=f"Delete it. {again}")
        return secret

    def _published(self, service: str, variable: str, readers: tuple[Readers, ...]) -> Published:
        return Published(service, variable, self.port(variable), readers)


DEFAULT_COORDINATOR = DEFAULT_PORTS["NOODLE_COORDINATOR_PORT"]
DEFAULT_VALKEY = DEFAULT_PORTS["NOODLE_VALKEY_PORT"]


def find_project(folder: Path) -> Project | None:
    """The project of a folder, None when it has no .env that `noodle init` wrote; raises ConfigurationError."""
    path = folder / ENV_NAME
    try:
        values = read_values(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} can not be read ({error}).", cure="Run `noodle init` again.") from error
    profiles = [name for name in values.get("COMPOSE_PROFILES", "").split(",") if name]
    if not profiles:
        return None
    role = next((name for name in ROLES if name in profiles), None)
    if role is None:
        raise ConfigurationError(
            f"COMPOSE_PROFILES in {path} is {','.join(profiles)!r}, which is none of {', '.join(ROLES)}.",
            cure="Run `noodle init --machine single`, `a` or `b`.",
        )
    return Project(folder, role, values)  # type: ignore[arg-type]  # one of ROLES


def require_project(folder: Path) -> Project:
    """The project of a folder; raises ConfigurationError where there is none."""
    project = find_project(folder)
    if project is None:
        raise ConfigurationError(
            f"{folder} has no {ENV_NAME} that says what this machine is.",
            cure="Go to noodle's folder and run `docker compose run --rm init` first (or `noodle init --machine a`).",
        )
    return project
