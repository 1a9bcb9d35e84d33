"""A project folder as `noodle init` leaves it: the text of .env, and the values, ports and secrets in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from noodle.errors import ConfigurationError

ENV_NAME = ".env"
COMPOSE_NAME = "docker-compose.yml"
SECRETS_NAME = "secrets"
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
ROLES: tuple[Role, ...] = ("single", "a", "b")
Clients = Literal["machine", "people"]  # the other machine's services; people with a browser or a client


@dataclass(frozen=True)
class Published:
    """A port that this machine opens to the network, and who connects to it."""

    service: str  # its name in compose
    variable: str
    port: int
    clients: tuple[Clients, ...]


# service, variable, clients, and the machines that publish it
PUBLISHED: tuple[tuple[str, str, tuple[Clients, ...], tuple[Role, ...]], ...] = (
    ("coordinator", "NOODLE_COORDINATOR_PORT", ("machine", "people"), ("single", "a")),
    ("valkey", "NOODLE_VALKEY_PORT", ("machine",), ("single", "a")),
    ("stage-0", "NOODLE_STAGE_0_PORT", ("machine",), ("single", "a")),
    ("stage-1", "NOODLE_STAGE_1_PORT", ("machine",), ("single", "b")),
    ("grafana", "NOODLE_GRAFANA_PORT", ("people",), ("single", "a")),
)


@dataclass(frozen=True)
class Project:
    """One machine's part of a cluster under Docker."""

    folder: Path
    role: Role
    values: Mapping[str, str] = field(repr=False)

    @property
    def lan_address(self) -> str:
        """The address on which this machine publishes its ports."""
        return self.values.get("NOODLE_LAN_ADDRESS") or LOOPBACK

    @property
    def peer_address(self) -> str:
        """The other machine's address; empty if there is none."""
        return self.values.get("NOODLE_PEER_ADDRESS", "")

    @property
    def machine(self) -> str:
        default = "machine-b" if self.role == "b" else "machine-a"
        return self.values.get("NOODLE_MACHINE") or default

    @property
    def coordinator_url(self) -> str:
        return self._url_on_a("http://", "NOODLE_COORDINATOR")

    @property
    def valkey_url(self) -> str:
        return self._url_on_a("redis://noodle@", "NOODLE_VALKEY")

    def _url_on_a(self, start: str, variable: str) -> str:
        if self.role == "b":
            default = f"{start}{self.peer_address}:{DEFAULT_PORTS[f'{variable}_PORT']}"
            return self.values.get(f"{variable}_URL") or default
        return f"{start}{self.lan_address}:{self.port(f'{variable}_PORT')}"

    @property
    def compose_files(self) -> list[str]:
        separator = self.values.get("COMPOSE_PATH_SEPARATOR") or ":"
        return [name for name in self.values.get("COMPOSE_FILE", COMPOSE_NAME).split(separator) if name]

    def port(self, variable: str) -> int:
        """Return a published port; raises ConfigurationError if the value is not a port."""
        default = DEFAULT_PORTS[variable]
        if variable == "NOODLE_STAGE_1_PORT" and self.role == "single":
            default = SECOND_STAGE_ON_ONE_MACHINE
        text = self.values.get(variable) or str(default)
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise ConfigurationError(
                f"{variable} in {self.folder / ENV_NAME} is {text!r}, which is not a port.", cure="Write 1 to 65535."
            )
        return int(text)

    def published(self) -> list[Published]:
        return [
            Published(service, variable, self.port(variable), clients)
            for service, variable, clients, roles in PUBLISHED
            if self.role in roles
        ]

    def secret(self, name: str) -> str:
        """Return a secret from its file; raises ConfigurationError if it cannot be read or is empty."""
        path = self.folder / SECRETS_NAME / name
        again = "Run `docker compose run --rm init` (or `noodle init`) again: it keeps what is there."
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except PermissionError as error:
            raise ConfigurationError(
                f"This user may not read {path}.", cure="Run this command with sudo, or as the file's owner."
            ) from error
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read ({error.strerror}).", cure=again) from error
        if not secret:
            raise ConfigurationError(f"{path} is empty.", cure=f"Delete it. {again}")
        return secret


def find_project(folder: Path) -> Project | None:
    """Return the project in a folder, None if `noodle init` wrote no .env there; raises ConfigurationError."""
    path = folder / ENV_NAME
    try:
        values = read_values(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}).", cure="Run `noodle init` again.") from error
    profiles = [name for name in values.get("COMPOSE_PROFILES", "").split(",") if name]
    if not profiles:
        return None
    role = next((name for name in ROLES if name in profiles), None)
    if role is None:
        raise ConfigurationError(
            f"COMPOSE_PROFILES in {path} is {','.join(profiles)!r}, which is none of {', '.join(ROLES)}.",
            cure="Run `noodle init --machine single`, `a` or `b`.",
        )
    return Project(folder, role, values)


def require_project(folder: Path) -> Project:
    """Return the project in a folder; raises ConfigurationError if there is none."""
    project = find_project(folder)
    if project is None:
        raise ConfigurationError(
            f"{folder} has no {ENV_NAME} that says what this machine is.",
            cure="Go to noodle's folder and run `docker compose run --rm init` first (or `noodle init --machine a`).",
        )
    return project


HEAD = """\
# What this machine runs, read by `docker compose`. `noodle init` wrote it. Run again, it keeps your own lines.
# .env.example lists every variable for this file.
"""


def read_values(text: str) -> dict[str, str]:
    """Return names and values as `docker compose` reads them: a later line wins, quotes around a value are dropped."""
    values = {}
    for line in text.splitlines():
        if (name := _name_in(line)) is not None:
            value = line.partition("=")[2].strip()
            if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            else:
                value = value.partition(" #")[0].rstrip()
            values[name] = value
    return values


def with_values(text: str, values: Mapping[str, str]) -> str:
    """Return the text with these values in their old places, new ones at the end, and all other lines kept."""
    left = dict(values)
    lines = []
    for line in (text or HEAD).splitlines():
        name = _name_in(line)
        if name in values:
            if name in left:
                lines.append(f"{name}={left.pop(name)}")
            continue  # a second line of a name would hide the first one
        lines.append(line)
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items())]) + "\n"


def _name_in(line: str) -> str | None:
    name, equals, _ = line.strip().removeprefix("export ").strip().partition("=")
    return name.strip() if equals and not name.startswith("#") else None
