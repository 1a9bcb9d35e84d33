"""What this machine is in a cluster: its role, addresses and secrets, and the services that it must reach.

It comes from a project folder's .env and secrets, else from a `noodle up` that runs, else from variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from noodle.config.addresses import host_of
from noodle.config.environment import read_variables
from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, NoodleError
from noodle.web.connectivity import Target
from services.cli.client.run_record import TOKEN_NAME, VALKEY_PASSWORD_NAME, RunRecord, run_folder_path, running
from services.cli.doctor.ports import Port
from services.cli.doctor.results import CheckResult, error, ok, skipped, warning
from services.cli.project.programs import System
from services.cli.project.project import COMPOSE_NAME, DEFAULT_PORTS, ENV_NAME, LOOPBACK, Project, find_project

UP_ROLE, HAND_ROLE, NEW_ROLE = "noodle up", "by hand", "not set up"
UP_VARIABLES = {
    "coordinator": "NOODLE_COORDINATOR_PORT",
    "valkey": "NOODLE_VALKEY_PORT",
    "planner": "NOODLE_PLANNER_PORT",
}
URL_VARIABLES = ("NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL", "NOODLE_ADVERTISE_URL")  # each means "set up by hand"
NAMES_OF_ROLE = {
    "single": {"coordinator", "valkey", "stage 0", "stage 1"},
    "a": {"coordinator", "valkey", "stage 0"},
    "b": {"stage 1"},
}


@dataclass(frozen=True, kw_only=True)
class MachineContext:
    """One machine as `noodle doctor` sees it."""

    role: str
    machine: str
    system: System
    project: Project | None = None
    host: str = LOOPBACK  # this machine's own address
    coordinator_url: str = ""
    targets: tuple[Target, ...] = ()
    own_names: frozenset[str] = frozenset()  # of the targets that run on this machine
    is_alone: bool = True  # no other machine takes part
    token: str = field(default="", repr=False)
    valkey_password: str = field(default="", repr=False)
    own_ports: tuple[int, ...] = ()  # of a `noodle up` that runs here
    advertised: tuple[tuple[str, str, str], ...] = ()  # description, URL or address, variable
    results: tuple[CheckResult, ...] = ()  # of reading all this

    @property
    def needs_docker(self) -> bool:
        """Whether noodle runs in containers here."""
        return self.role not in (UP_ROLE, HAND_ROLE)


def find_context(config: CommandConfig, environment: Mapping[str, str], folder: Path, system: System) -> MachineContext:
    """Return the context of this machine; raises ConfigurationError for an invalid .env."""
    project = find_project(folder)
    if project is not None:
        return _of_project(project, system)
    record = running(config.state_dir)
    if record is not None:
        return _of_run(record, config, system)
    if (folder / COMPOSE_NAME).is_file() and not any(environment.get(name) for name in URL_VARIABLES):
        finding = warning(
            "settings",
            config.machine,
            f"{folder} has no .env yet that says what this machine is.",
            why="the services that this machine must reach are unknown, so only the machine itself is checked",
            cure="docker compose run --rm init   (one host; add --machine a or b for one of two)",
        )
        return MachineContext(role=NEW_ROLE, machine=config.machine, system=system, results=(finding,))
    return _of_variables(config, environment, folder, system)


def _of_project(project: Project, system: System) -> MachineContext:
    results: list[CheckResult] = []
    machine = project.machine
    try:
        read_variables({name: value for name, value in project.values.items() if name.startswith("NOODLE_")})
        results.append(ok("settings", machine, f"{project.folder / ENV_NAME} is valid"))
    except ConfigurationError as problem:
        why = "every service refuses to start with it"
        results.append(error("settings", machine, f".env: {problem.message}", why=why, cure=problem.cure))
    token = _secret(lambda: project.secret("cluster_token"), machine, results)
    password = _secret(lambda: project.secret("valkey_password"), machine, results)
    own, other = project.lan_address, project.peer_address
    first = Target("stage 0", f"http://{own if project.role != 'b' else other}:{project.port('NOODLE_STAGE_0_PORT')}")
    second_host = other if project.role == "a" else own  # A knows B's port from its own .env, or takes the default
    second = Target("stage 1", f"http://{second_host}:{project.port('NOODLE_STAGE_1_PORT')}")
    targets = (Target("coordinator", project.coordinator_url), Target("valkey", project.valkey_url), first, second)
    return MachineContext(
        role=project.role,
        machine=machine,
        system=system,
        project=project,
        host=own,
        coordinator_url=project.coordinator_url,
        targets=tuple(target for target in targets if host_of(target.url)),
        own_names=frozenset(NAMES_OF_ROLE[project.role]),
        is_alone=project.role == "single",
        token=token,
        valkey_password=password,
        advertised=_advertised_of(project),
        results=tuple(results),
    )


def _advertised_of(project: Project) -> tuple[tuple[str, str, str], ...]:
    """Return the addresses by which the machines of a project find each other."""
    if project.role == "single":
        return ()
    names = ["NOODLE_PEER_ADDRESS"]
    if project.role == "b":
        names += ["NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL"]
    names = ["NOODLE_LAN_ADDRESS", *(name for name in names if project.values.get(name))]
    return tuple((f"{name} in .env", project.values.get(name, ""), name) for name in names)


def _of_run(record: RunRecord, config: CommandConfig, system: System) -> MachineContext:
    run_folder = run_folder_path(config.state_dir)
    results: list[CheckResult] = []
    targets = tuple(
        Target(
            service.name.replace("-", " "),
            f"{'redis' if service.name == 'valkey' else 'http'}://{LOOPBACK}:{service.port}",
        )
        for service in record.services
    )
    return MachineContext(
        role=UP_ROLE,
        machine=config.machine,
        system=system,
        coordinator_url=record.coordinator_url,
        targets=targets,
        own_names=frozenset(target.name for target in targets),
        token=_secret(lambda: _read(run_folder / TOKEN_NAME, "cluster token"), config.machine, results),
        valkey_password=_secret(
            lambda: _read(run_folder / VALKEY_PASSWORD_NAME, "Valkey password"), config.machine, results
        ),
        own_ports=tuple(service.port for service in record.services),
        results=tuple(results),
    )


def _of_variables(
    config: CommandConfig, environment: Mapping[str, str], folder: Path, system: System
) -> MachineContext:
    values = read_variables(environment)
    reason = f"{folder} has no .env of `noodle init`, and no `noodle up` runs: the NOODLE_ variables are used"
    targets = [Target("coordinator", config.coordinator_url), Target("valkey", values["NOODLE_VALKEY_URL"])]
    advertise_url = str(values["NOODLE_ADVERTISE_URL"])
    if advertise_url:
        targets.append(Target(f"stage {values['NOODLE_STAGE_ID']}", advertise_url))
    is_alone = all(host_of(target.url) in (LOOPBACK, "localhost") for target in targets[:2])
    own_host = host_of(advertise_url) or LOOPBACK
    advertised = ("NOODLE_ADVERTISE_URL", advertise_url, "NOODLE_ADVERTISE_URL")
    return MachineContext(
        role=HAND_ROLE,
        machine=config.machine,
        system=system,
        host=own_host,
        coordinator_url=config.coordinator_url,
        targets=tuple(targets),
        own_names=frozenset(target.name for target in targets if host_of(target.url) in (own_host, LOOPBACK)),
        is_alone=is_alone,
        token=config.cluster_token,
        valkey_password=config.valkey_password,
        advertised=(advertised,) if advertise_url and not is_alone else (),
        results=(skipped("settings", config.machine, reason),),
    )


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise ConfigurationError(
            f"The {what} in {path} cannot be read ({problem.strerror}).",
            cure="Run this as the user who started `noodle up`.",
        ) from problem


def _secret(read: Callable[[], str], machine: str, results: list[CheckResult]) -> str:
    """Return a secret, or an empty text and add a finding."""
    try:
        return read()
    except NoodleError as problem:
        why = "without it the services do not start, and their locks cannot be tried"
        results.append(error("secrets", machine, problem.message, why=why, cure=problem.cure))
        return ""


def ports_to_try(context: MachineContext) -> list[Port]:
    """Return all ports that this machine listens on, or will; none if it was set up by hand and they are unknown."""
    if context.project is not None:
        addresses = dict.fromkeys([LOOPBACK, context.host])
        return [
            Port(published.service, published.variable, address, published.port)
            for published in context.project.published()
            for address in addresses
        ]
    if context.role != UP_ROLE:
        return []
    return [
        Port(
            target.name,
            UP_VARIABLES.get(target.name, "NOODLE_FIRST_STAGE_PORT"),
            host_of(target.url),
            urlsplit(target.url).port or DEFAULT_PORTS["NOODLE_COORDINATOR_PORT"],
        )
        for target in context.targets
    ]
