"""What this machine is in a cluster, for `noodle doctor`: its part, its addresses and secrets, and whom it must reach.

From .env and secrets of a project folder, from a `noodle up` that runs, or from variables, in this order.
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
from services.cli.doctor.outcome import Outcome, error, ok, skipped, warning
from services.cli.local.run_state import RunFolder, RunRecord, run_folder_path, running
from services.cli.project.programs import System
from services.cli.project.project import COMPOSE_NAME, DEFAULT_PORTS, ENV_NAME, LOOPBACK, Project, find_project

UP_ROLE, HAND_ROLE, NEW_ROLE = "noodle up", "by hand", "not set up"
UP_VARIABLES = {
    "coordinator": "NOODLE_COORDINATOR_PORT",
    "valkey": "NOODLE_VALKEY_PORT",
    "planner": "NOODLE_PLANNER_PORT",
}
WAYS = ("NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL", "NOODLE_ADVERTISE_URL")  # one of them makes a machine by hand


@dataclass(frozen=True)
class Situation:
    """One machine as its doctor sees it."""

    role: str
    machine: str
    system: System
    project: Project | None
    host: str  # this machine's own address
    coordinator_url: str
    targets: tuple[Target, ...]
    own_names: frozenset[str]  # those of the targets that run on this machine
    is_alone: bool  # no other machine takes part
    token: str = field(default="", repr=False)
    valkey_password: str = field(default="", repr=False)
    own_ports: tuple[int, ...] = ()  # of a `noodle up` that runs here
    advertised: tuple[tuple[str, str, str], ...] = ()  # what, URL or address, the variable that it comes from
    outcomes: tuple[Outcome, ...] = ()  # of reading all this

    @property
    def needs_docker(self) -> bool:
        """Whether noodle runs in containers here."""
        return self.role not in (UP_ROLE, HAND_ROLE)


def find_situation(config: CommandConfig, environment: Mapping[str, str], folder: Path, system: System) -> Situation:
    """Raises ConfigurationError for a .env that says nothing."""
    project = find_project(folder)
    if project is not None:
        return _of_project(project, system)
    record = running(config.state_dir)
    if record is not None:
        return _of_run(record, config, system)
    if (folder / COMPOSE_NAME).is_file() and not any(environment.get(name) for name in WAYS):
        return _of_new_machine(config, folder, system)
    return _of_variables(config, environment, folder, system)


def _of_new_machine(config: CommandConfig, folder: Path, system: System) -> Situation:
    """A folder in which nothing was done yet: the machine itself can be looked at, and nobody else."""
    finding = warning(
        "settings",
        config.machine,
        f"{folder} has no .env yet that says what this machine is.",
        why="it is not known whom this machine must reach; only the machine itself is looked at",
        cure="docker compose run --rm init   (alone; with --machine a or b for one of two)",
    )
    return Situation(NEW_ROLE, config.machine, system, None, LOOPBACK, "", (), frozenset(), True, outcomes=(finding,))


def _of_project(project: Project, system: System) -> Situation:
    outcomes: list[Outcome] = []
    machine = project.machine
    try:
        read_variables({name: value for name, value in project.values.items() if name.startswith("NOODLE_")})
        outcomes.append(ok("settings", machine, f"{project.folder / ENV_NAME} is understood"))
    except ConfigurationError as problem:
        why = "every service refuses to start with it"
        outcomes.append(error("settings", machine, f".env: {problem.message}", why=why, cure=problem.cure))
    token = _secret(project, "cluster_token", outcomes)
    password = _secret(project, "valkey_password", outcomes)
    own, other = project.lan_address, project.peer_address
    first = Target("stage 0", f"http://{own if project.role != 'b' else other}:{project.port('NOODLE_STAGE_0_PORT')}")
    second_host = other if project.role == "a" else own
    second = Target("stage 1", f"http://{second_host}:{_second_stage_port(project)}")
    targets = (Target("coordinator", project.coordinator_url), Target("valkey", project.valkey_url), first, second)
    own_names = {
        "single": {"coordinator", "valkey", "stage 0", "stage 1"},
        "a": {"coordinator", "valkey", "stage 0"},
        "b": {"stage 1"},
    }[project.role]
    is_alone = project.role == "single"
    return Situation(
        project.role,
        machine,
        system,
        project,
        own,
        project.coordinator_url,
        tuple(target for target in targets if host_of(target.url)),
        frozenset(own_names),
        is_alone,
        token,
        password,
        advertised=() if is_alone else (_named(project, "NOODLE_LAN_ADDRESS"), *_named_of_peer(project)),
        outcomes=tuple(outcomes),
    )


def _second_stage_port(project: Project) -> int:
    """B's port as A can know it: the one that A's .env names, else the default."""
    return project.port("NOODLE_STAGE_1_PORT")


def _named(project: Project, variable: str) -> tuple[str, str, str]:
    return f"{variable} in .env", project.values.get(variable, ""), variable


def _named_of_peer(project: Project) -> list[tuple[str, str, str]]:
    names = ["NOODLE_PEER_ADDRESS"]
    if project.role == "b":
        names += ["NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL"]
    return [_named(project, name) for name in names if project.values.get(name)]


def _of_run(record: RunRecord, config: CommandConfig, system: System) -> Situation:
    run_folder = RunFolder(run_folder_path(config.state_dir))
    outcomes: list[Outcome] = []
    token = _read(run_folder.token_path, "cluster token", config.machine, outcomes)
    password = _read(run_folder.valkey_password_path, "Valkey password", config.machine, outcomes)
    targets = [
        Target(
            service.name.replace("-", " "),
            f"{'redis' if service.name == 'valkey' else 'http'}://{LOOPBACK}:{service.port}",
        )
        for service in record.services
    ]
    return Situation(
        UP_ROLE,
        config.machine,
        system,
        None,
        LOOPBACK,
        record.coordinator_url,
        tuple(targets),
        frozenset(target.name for target in targets),
        True,
        token,
        password,
        own_ports=tuple(service.port for service in record.services),
        outcomes=tuple(outcomes),
    )


def _of_variables(config: CommandConfig, environment: Mapping[str, str], folder: Path, system: System) -> Situation:
    values = read_variables(environment)
    reason = f"{folder} has no .env of `noodle init`, and no `noodle up` runs: what NOODLE_ variables say is looked at"
    targets = [Target("coordinator", config.coordinator_url), Target("valkey", values["NOODLE_VALKEY_URL"])]
    advertise_url = str(values["NOODLE_ADVERTISE_URL"])
    stage_name = f"stage {values['NOODLE_STAGE_ID']}"
    if advertise_url:
        targets.append(Target(stage_name, advertise_url))
    is_alone = all(host_of(target.url) in (LOOPBACK, "localhost") for target in targets[:2])
    own_host = host_of(advertise_url) or LOOPBACK
    return Situation(
        HAND_ROLE,
        config.machine,
        system,
        None,
        own_host,
        config.coordinator_url,
        tuple(targets),
        frozenset(target.name for target in targets if host_of(target.url) in (own_host, LOOPBACK)),
        is_alone,
        config.cluster_token,
        config.valkey_password,
        advertised=(("NOODLE_ADVERTISE_URL", advertise_url, "NOODLE_ADVERTISE_URL"),)
        if advertise_url and not is_alone
        else (),
        outcomes=(skipped("settings", config.machine, reason),),
    )


def _secret(project: Project, name: str, outcomes: list[Outcome]) -> str:
    return _told(lambda: project.secret(name), project.machine, outcomes)


def _read(path: Path, what: str, machine: str, outcomes: list[Outcome]) -> str:
    def read() -> str:
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError as problem:
            raise ConfigurationError(
                f"The {what} in {path} can not be read ({problem.strerror}).",
                cure="Run this as the user who started `noodle up`.",
            ) from problem

    return _told(read, machine, outcomes)


def _told(read: Callable[[], str], machine: str, outcomes: list[Outcome]) -> str:
    """A secret, or an empty text and a finding."""
    try:
        return read()
    except NoodleError as problem:
        why = "without it nobody's lock can be tried, and the services do not start"
        outcomes.append(error("secrets", machine, problem.message, why=why, cure=problem.cure))
        return ""


def ports_to_try(situation: Situation) -> list[tuple[str, str, str, int]]:
    """Service, variable, address and port of all that this machine listens on, or is going to; none by hand, where
    nobody says which programs are to be started here."""
    if situation.project is not None:
        addresses = dict.fromkeys([LOOPBACK, situation.host])
        return [
            (published.service, published.variable, address, published.port)
            for published in situation.project.published()
            for address in addresses
        ]
    if situation.role != UP_ROLE:
        return []
    return [
        (target.name, UP_VARIABLES.get(target.name, "NOODLE_FIRST_STAGE_PORT"), host_of(target.url), _port_of(target))
        for target in situation.targets
    ]


def _port_of(target: Target) -> int:
    return urlsplit(target.url).port or DEFAULT_PORTS["NOODLE_COORDINATOR_PORT"]
