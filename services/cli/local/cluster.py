"""The processes that `noodle up` starts: one cluster on loopback, with its ports and environments."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noodle.config.cores import usable_cores
from noodle.config.environment import read_variables
from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, PortInUse
from services.cli.local.processes import python_module
from services.cli.local.run_folder import RunFolder
from services.cli.local.supervisor import ServiceSpec

LOOPBACK = "127.0.0.1"

# `up` chooses these for each process it starts, so a value from outside is refused and not ignored
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
# the coordinator stops first, so that no new requests come in; Valkey last, because all others write to it
COORDINATOR_RANK, STAGE_RANK, PLANNER_RANK, VALKEY_RANK = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What the operator asked for, checked as far as possible without the model."""

    config: CommandConfig  # has the ports, but not the values below: options go before it
    stage_count: int
    model: str
    split: str  # layers per stage, as 10,2; empty: by measured speed

    @property
    def coordinator_url(self) -> str:
        return f"http://{LOOPBACK}:{self.config.coordinator_port}"

    @property
    def stage_ports(self) -> tuple[int, ...]:
        return tuple(self.config.first_stage_port + index for index in range(self.stage_count))

    def ports(self) -> list[tuple[int, str, str]]:
        """Return (port, purpose, variable that moves it) of everything that will listen."""
        stages = [(port, f"stage {index}", "NOODLE_FIRST_STAGE_PORT") for index, port in enumerate(self.stage_ports)]
        return [
            (self.config.coordinator_port, "the coordinator", "NOODLE_COORDINATOR_PORT"),
            (self.config.planner_port, "the planner", "NOODLE_PLANNER_PORT"),
            (self.config.valkey_port, "Valkey", "NOODLE_VALKEY_PORT"),
            *stages,
        ]


def resolve(
    config: CommandConfig, environment: Mapping[str, str], stage_count: int | None, model: str | None, split: str | None
) -> ClusterSpec:
    """Merge options, variables and defaults, in this order; raises ConfigurationError if they contradict."""
    for name in CHOSEN_BY_UP:
        if environment.get(name):
            raise ConfigurationError(
                f"{name} is set, but `noodle up` chooses its value.",
                cure="Unset it. The ports of `noodle up` are NOODLE_COORDINATOR_PORT, NOODLE_PLANNER_PORT, "
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
            f"The split {split} is for {len(layers)} stages, but {stage_count} are requested.",
            cure="Give one number for each stage.",
        )
    spec = ClusterSpec(
        config=config,
        stage_count=stage_count,
        model=config.model if model is None else model,
        split=",".join(part.strip() for part in layers),
    )
    _refuse_shared_ports(spec)
    return spec


def _refuse_shared_ports(spec: ClusterSpec) -> None:
    taken: dict[int, str] = {}
    for port, purpose, variable in spec.ports():
        if port > 65535:
            raise ConfigurationError(f"{purpose} would listen on port {port}.", cure=f"Choose a lower {variable}.")
        if port in taken:
            raise ConfigurationError(
                f"Port {port} is assigned to {taken[port]} and to {purpose}.", cure=f"Set {variable} to another port."
            )
        taken[port] = purpose


def refuse_ports_in_use(spec: ClusterSpec) -> None:
    """Raise PortInUse if another program listens on one of the ports."""
    for port, purpose, variable in spec.ports():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT does not count
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                raise PortInUse(
                    f"Port {port} for {purpose} is taken: {error.strerror}.",
                    cure=f"Stop the program that listens there, or set {variable} to another port.",
                ) from error


def children_environment(environment: Mapping[str, str], config: CommandConfig, folder: RunFolder) -> dict[str, str]:
    """Return the environment of every service: the operator's variables, and secrets by file, never by value."""
    common = {
        name: value
        for name, value in environment.items()
        if name not in ("NOODLE_CLUSTER_TOKEN", "NOODLE_CLUSTER_TOKEN_FILE", "NOODLE_SPLIT", "NOODLE_STAGES")
    }
    return common | {
        "NOODLE_CLUSTER_TOKEN_FILE": str(folder.token_path),
        "NOODLE_VALKEY_PASSWORD_FILE": str(folder.valkey_password_path),
        "NOODLE_CACHE_DIR": str(config.cache_dir),
        "PYTHONUNBUFFERED": "1",  # so that the log has the last lines of a process that dies
    }


def valkey_spec(spec: ClusterSpec, binary: Path, configuration: Path) -> ServiceSpec:
    return ServiceSpec(
        name="valkey",
        arguments=(str(binary), str(configuration)),
        environment={"LC_ALL": "C"},
        port=spec.config.valkey_port,
        stop_rank=VALKEY_RANK,
    )


def service_specs(spec: ClusterSpec, common: Mapping[str, str], model: Path) -> Sequence[ServiceSpec]:
    """Return planner, stages and coordinator, in the order of their start."""
    config = spec.config
    shared = dict(common) | {
        "NOODLE_VALKEY_URL": f"redis://{LOOPBACK}:{config.valkey_port}",
        "NOODLE_MODEL": str(model),
    }
    threads = config.threads or max(1, usable_cores() // spec.stage_count)

    def service(name: str, variables: Mapping[str, str], port: int, stop_rank: int) -> ServiceSpec:
        module = python_module(f"services.{name.partition('-')[0]}")
        return ServiceSpec(
            name=name, arguments=module, environment={**shared, **variables}, port=port, stop_rank=stop_rank
        )

    planner = {
        "NOODLE_PLANNER_BIND": f"{LOOPBACK}:{config.planner_port}",
        "NOODLE_STAGES": str(spec.stage_count),
        "NOODLE_SPLIT": spec.split,
    }
    specs = [service("planner", planner, config.planner_port, PLANNER_RANK)]
    for index, port in enumerate(spec.stage_ports):
        stage = {
            "NOODLE_STAGE_ID": str(index),
            "NOODLE_STAGE_BIND": f"{LOOPBACK}:{port}",
            "NOODLE_ADVERTISE_URL": f"http://{LOOPBACK}:{port}",
            "NOODLE_COORDINATOR_URL": spec.coordinator_url,  # the operator's variable may name another cluster
            "NOODLE_THREADS": str(threads),
        }
        specs.append(service(f"stage-{index}", stage, port, STAGE_RANK))
    coordinator = {
        "NOODLE_MODEL": spec.model,  # the name that clients use; the cache has the same folder under it
        "NOODLE_COORDINATOR_BIND": f"{LOOPBACK}:{config.coordinator_port}",
        "NOODLE_PLANNER_URL": f"http://{LOOPBACK}:{config.planner_port}",
    }
    return [*specs, service("coordinator", coordinator, config.coordinator_port, COORDINATOR_RANK)]
