"""What `noodle up` starts: the processes of one cluster on loopback, their ports and environments; acts on nothing."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noodle.config.environment import read_variables
from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, PortInUse
from services.cli.local.processes import usable_cores
from services.cli.local.run_state import RunFolder
from services.cli.local.supervisor import ServiceSpec

LOOPBACK = "127.0.0.1"

# `up` chooses these for each process it starts, so a value from outside would be ignored: it is refused instead
CHOSEN_BY_UP = (
    "NOODLE_COORDINATOR_BIND",
    "NOODLE_PLANNER_BIND",
    "NOODLE_PLANNER_URL",
    "NOODLE_STAGE_BIND",
    "NOODLE_STAGE_ID",
    "NOODLE_ADVERTISE_URL",
    "NOODLE_VALKEY_URL",
    "NOODLE_VALKEY_PASSWORD",
    "NOODLE_VALKEY_PASSWORD_FILE",
)
# the coordinator first, so that nothing new comes in; Valkey last, because all others write to it
COORDINATOR_RANK, STAGE_RANK, PLANNER_RANK, VALKEY_RANK = 0, 1, 2, 3


@dataclass(frozen=True)
class Wanted:
    """What the operator asked for, checked as far as it can be without the model."""

    stage_count: int
    model: str
    split: str  # layers per stage, as 10,2; empty: by measured speed
    coordinator_port: int
    planner_port: int
    valkey_port: int
    stage_ports: tuple[int, ...]

    @property
    def coordinator_url(self) -> str:
        """Where requests go."""
        return f"http://{LOOPBACK}:{self.coordinator_port}"

    def ports(self) -> list[tuple[int, str, str]]:
        """(port, what it is for, the variable that moves it) of everything that will listen."""
        stages = [(port, f"stage {index}", "NOODLE_FIRST_STAGE_PORT") for index, port in enumerate(self.stage_ports)]
        return [
            (self.coordinator_port, "the coordinator", "NOODLE_COORDINATOR_PORT"),
            (self.planner_port, "the planner", "NOODLE_PLANNER_PORT"),
            (self.valkey_port, "Valkey", "NOODLE_VALKEY_PORT"),
            *stages,
        ]


def resolve(
    config: CommandConfig,
    environment: Mapping[str, str],
    stage_count: int | None,
    model: str | None,
    split: str | None,
) -> Wanted:
    """Options over variables over defaults; raises ConfigurationError when they contradict one another."""
    for name in CHOSEN_BY_UP:
        if environment.get(name):
            raise ConfigurationError(
                f"{name} is set, but `noodle up` chooses it itself.",
                cure="Unset it; the ports of `noodle up` are NOODLE_COORDINATOR_PORT, NOODLE_PLANNER_PORT, "
                "NOODLE_FIRST_STAGE_PORT and NOODLE_VALKEY_PORT.",
            )
    split = ",".join(map(str, config.split or ())) if split is None else split
    layers = split.split(",") if split else []
    if not all(part.strip().isdigit() and int(part) > 0 for part in layers):
        raise ConfigurationError(
            f"The split {split!r} is not a number of layers for each stage.", cure="Write it as --split 10,2."
        )
    if stage_count is None:
        stages_are_set = bool(environment.get("NOODLE_STAGES"))
        stage_count = len(layers) if layers and not stages_are_set else read_variables(environment)["NOODLE_STAGES"]
    if layers and len(layers) != stage_count:
        raise ConfigurationError(
            f"The split {split} is for {len(layers)} stages, but {stage_count} are asked for.",
            cure="Give as many numbers as there are stages.",
        )
    wanted = Wanted(
        stage_count=stage_count,
        model=config.model if model is None else model,
        split=",".join(part.strip() for part in layers),
        coordinator_port=config.coordinator_port,
        planner_port=config.planner_port,
        valkey_port=config.valkey_port,
        stage_ports=tuple(config.first_stage_port + index for index in range(stage_count)),
    )
    _refuse_ports_that_meet(wanted)
    return wanted


def _refuse_ports_that_meet(wanted: Wanted) -> None:
    taken: dict[int, str] = {}
    for port, purpose, variable in wanted.ports():
        if port > 65535:
            raise ConfigurationError(f"{purpose} would listen on port {port}.", cure=f"Choose a lower {variable}.")
        if port in taken:
            raise ConfigurationError(
                f"Port {port} is meant for {taken[port]} and for {purpose}.", cure=f"Set {variable} to another one."
            )
        taken[port] = purpose


def refuse_ports_in_use(wanted: Wanted) -> None:
    """Raise PortInUse when another program listens where one of ours is to listen."""
    for port, purpose, variable in wanted.ports():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no program
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                raise PortInUse(
                    f"Port {port}, meant for {purpose}, is taken: {error.strerror}.",
                    cure=f"Stop the program that listens there, or set {variable} to another port.",
                ) from error


def children_environment(environment: Mapping[str, str], config: CommandConfig, folder: RunFolder) -> dict[str, str]:
    """What every service gets: the operator's own variables, and secrets by file, never by value."""
    common = {
        name: value
        for name, value in environment.items()
        if name not in ("NOODLE_CLUSTER_TOKEN", "NOODLE_CLUSTER_TOKEN_FILE", "NOODLE_SPLIT", "NOODLE_STAGES")
    }
    return common | {
        "NOODLE_CLUSTER_TOKEN_FILE": str(folder.token_path),
        "NOODLE_VALKEY_PASSWORD_FILE": str(folder.valkey_password_path),
        "NOODLE_CACHE_DIR": str(config.cache_dir),
        "PYTHONUNBUFFERED": "1",  # the last words of a process that dies are in its log
    }


def python_module(name: str, *arguments: str) -> tuple[str, ...]:
    """Run a module of the installed project; -P keeps a `services` folder in the current directory out of the way."""
    return (sys.executable, "-P", "-m", name, *arguments)


def valkey_spec(wanted: Wanted, binary: Path, configuration: Path) -> ServiceSpec:
    """The queue; it needs nothing of noodle's."""
    arguments = (str(binary), str(configuration))
    return ServiceSpec("valkey", arguments, {"LC_ALL": "C"}, wanted.valkey_port, VALKEY_RANK)


def service_specs(
    wanted: Wanted, config: CommandConfig, common: Mapping[str, str], model_folder: Path
) -> Sequence[ServiceSpec]:
    """Planner, stages and coordinator, in the order they are started in."""
    shared = dict(common) | {
        "NOODLE_VALKEY_URL": f"redis://{LOOPBACK}:{wanted.valkey_port}",
        "NOODLE_MODEL": str(model_folder),
    }
    threads = config.threads or max(1, usable_cores() // wanted.stage_count)
    planner = shared | {
        "NOODLE_PLANNER_BIND": f"{LOOPBACK}:{wanted.planner_port}",
        "NOODLE_STAGES": str(wanted.stage_count),
        "NOODLE_SPLIT": wanted.split,
    }
    # the coordinator calls the model by the name the operator gave; it finds the same folder in the cache
    coordinator = shared | {
        "NOODLE_MODEL": wanted.model,
        "NOODLE_COORDINATOR_BIND": f"{LOOPBACK}:{wanted.coordinator_port}",
        "NOODLE_PLANNER_URL": f"http://{LOOPBACK}:{wanted.planner_port}",
    }
    specs = [
        ServiceSpec("planner", python_module("services.planner"), planner, wanted.planner_port, PLANNER_RANK),
    ]
    for index, port in enumerate(wanted.stage_ports):
        stage = shared | {
            "NOODLE_STAGE_ID": str(index),
            "NOODLE_STAGE_BIND": f"{LOOPBACK}:{port}",
            "NOODLE_ADVERTISE_URL": f"http://{LOOPBACK}:{port}",
            "NOODLE_COORDINATOR_URL": wanted.coordinator_url,  # that of a command may be another one
            "NOODLE_THREADS": str(threads),
        }
        specs.append(ServiceSpec(f"stage-{index}", python_module("services.stage"), stage, port, STAGE_RANK))
    arguments = python_module("services.coordinator")
    specs.append(ServiceSpec("coordinator", arguments, coordinator, wanted.coordinator_port, COORDINATOR_RANK))
    return specs
