"""What .env says of a machine: from what was asked for, what stood there before, and the join line; pure.

Refuses, by name, what contradicts itself, the kind of machine, or what this folder already is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from noodle.config.environment import read_variables
from noodle.errors import ConfigurationError
from services.cli.project.join_line import Join

Kind = Literal["single", "a", "b"]
KINDS: tuple[Kind, ...] = ("single", "a", "b")
STAGES_OF_SINGLE = 2  # stage services that docker-compose.yml has for one host
LOOPBACK = "127.0.0.1"
COMPOSE_FILE, LAN_FILE, GPU_FILE = "docker-compose.yml", "docker-compose.lan.yml", "docker-compose.gpu.yml"
SEPARATOR = ":"  # of COMPOSE_FILE; Windows has another one unless it is said
MODELS_FOLDER = "models"  # of the project; the coordinator sees it as /models
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_NAMES = {"single": "machine-a", "a": "machine-a", "b": "machine-b"}
PORTS = {
    "single": ("COORDINATOR", "VALKEY", "STAGE_0", "STAGE_1", "GRAFANA"),
    "a": ("COORDINATOR", "VALKEY", "STAGE_0", "GRAFANA"),
    "b": ("STAGE_1",),
}
DEFAULT_PORTS = {"COORDINATOR": "8080", "VALKEY": "6379", "STAGE_0": "8081", "STAGE_1": "8082", "GRAFANA": "3000"}
STAGE_1_PORT_OF_B = "8081"


@dataclass(frozen=True)
class Wish:
    """The options of `noodle init`; None is not given."""

    machine: Kind | None = None
    address: str | None = None
    peer: str | None = None
    join: Join | None = None
    gpu: bool | None = None
    stages: int | None = None
    model: str | None = None
    name: str | None = None


def settings(wish: Wish, before: Mapping[str, str], cores: int) -> dict[str, str]:
    """The lines of .env, in their order; `before` is what it holds now. Raises ConfigurationError."""
    read_variables({name: value for name, value in before.items() if name.startswith("NOODLE_")})
    kind = _kind(wish, before)
    _refuse_what_is_for_another_kind(kind, wish)
    address, peer = _addresses(kind, wish, before)
    values = {
        "COMPOSE_PROJECT_NAME": before.get("COMPOSE_PROJECT_NAME") or "noodle",
        "COMPOSE_PROFILES": kind,
        "COMPOSE_FILE": SEPARATOR.join(_files(kind, wish, before)),
        "COMPOSE_PATH_SEPARATOR": SEPARATOR,
        "NOODLE_MACHINE": _name(kind, wish, before),
        "NOODLE_LAN_ADDRESS": address,
        "NOODLE_PEER_ADDRESS": peer,
    }
    if kind == "b":
        values |= _ways_to_a(wish, before)
    else:
        stages = wish.stages or int(before.get("NOODLE_STAGES") or STAGES_OF_SINGLE)
        if kind == "single" and stages != STAGES_OF_SINGLE:
            raise ConfigurationError(
                f"--stages {stages}: docker-compose.yml has {STAGES_OF_SINGLE} stages for one host.",
                cure=f"Leave it out, or run `noodle up --stages {stages}` without Docker.",
            )
        values["NOODLE_STAGES"] = str(stages)
        values["NOODLE_MODEL"] = _model(wish, before)
    if kind == "single":  # two stages share this host; alone on a machine a stage takes every core by itself
        values["NOODLE_THREADS"] = before.get("NOODLE_THREADS") or str(max(1, cores // STAGES_OF_SINGLE))
    values |= _ports(kind, before)
    read_variables({name: value for name, value in values.items() if name.startswith("NOODLE_")})
    return values


def _kind(wish: Wish, before: Mapping[str, str]) -> Kind:
    said = before.get("COMPOSE_PROFILES", "")
    was = next((kind for kind in KINDS if kind in said.split(",")), None)
    if said and was is None:
        raise ConfigurationError(
            f"COMPOSE_PROFILES in .env is {said!r}, which is no machine of noodle.",
            cure="Delete that line, or make it single, a or b.",
        )
    if wish.machine is not None and was is not None and wish.machine != was:
        raise ConfigurationError(
            f"This folder is machine {was!r} by its .env, and --machine says {wish.machine!r}.",
            cure="Use another folder; or stop what runs (docker compose down) and delete .env and secrets/ first.",
        )
    return wish.machine or was or ("b" if wish.join is not None else "single")


def _refuse_what_is_for_another_kind(kind: Kind, wish: Wish) -> None:
    given = {
        "--address": wish.address is not None,
        "--peer": wish.peer is not None,
        "--join": wish.join is not None,
        "--gpu": bool(wish.gpu),
        "--stages": wish.stages is not None,
        "--model": wish.model is not None,
    }
    reasons = {
        "single": {
            "--address": "it is reached on 127.0.0.1 alone",
            "--peer": "there is no other machine",
            "--join": "there is no other machine",
        },
        "a": {"--join": "machine B joins machine A, not the other way round"},
        "b": {
            "--peer": "the join line says where machine A is",
            "--gpu": "docker-compose.gpu.yml is for the stage of machine A",
            "--stages": "machine A decides how many stages there are",
            "--model": "machine A decides which model is served, and its weights come from there",
        },
    }
    for option, reason in reasons[kind].items():
        if given[option]:
            raise ConfigurationError(f"{option} means nothing with --machine {kind}: {reason}.", cure="Leave it out.")


def _addresses(kind: Kind, wish: Wish, before: Mapping[str, str]) -> tuple[str, str]:
    """This machine's address and the other one's."""
    if kind == "single":
        return LOOPBACK, ""
    known_address, known_peer = before.get("NOODLE_LAN_ADDRESS", ""), before.get("NOODLE_PEER_ADDRESS", "")
    if kind == "a":
        address, peer = wish.address or known_address, wish.peer or known_peer
    else:
        address = wish.address or known_address or (wish.join.peer_address if wish.join else "")
        peer = wish.join.address if wish.join else known_peer
    for option, value in (("--address", address), ("--peer", peer)):
        if not value and not (kind == "b" and option == "--peer"):
            raise ConfigurationError(
                f"Machine {kind} needs {option}: the IPv4 address of "
                f"{'this machine' if option == '--address' else 'the other machine'} on your network.",
                cure="Give both machines a fixed one: --machine a --address 192.168.1.101 --peer 192.168.1.102.",
            )
        if value:
            _check_address(option, value)
    if address == peer:
        raise ConfigurationError(
            f"This machine and the other one have the same address, {address}.",
            cure="Say this machine's own with --address"
            + (", and the other one's with --peer." if kind == "a" else "."),
        )
    return address, peer


def _check_address(option: str, value: str) -> None:
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        _refuse_address(option, value, "is no IPv4 address")
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        _refuse_address(option, value, "is nothing that another machine can reach")


def _refuse_address(option: str, value: str, reason: str) -> NoReturn:
    raise ConfigurationError(
        f"{option} {value} {reason}.",
        cure="Write the machine's own address on your network, as 192.168.1.101 (`ip -4 address`, or `ipconfig`).",
    )


def _files(kind: Kind, wish: Wish, before: Mapping[str, str]) -> list[str]:
    separator = before.get("COMPOSE_PATH_SEPARATOR") or SEPARATOR
    had = [name for name in before.get("COMPOSE_FILE", "").split(separator) if name]
    has_gpu = GPU_FILE in had if wish.gpu is None else wish.gpu
    ours = [COMPOSE_FILE, *([LAN_FILE] if kind != "single" else []), *([GPU_FILE] if has_gpu else [])]
    return [*ours, *(name for name in had if name not in (COMPOSE_FILE, LAN_FILE, GPU_FILE))]


def _name(kind: Kind, wish: Wish, before: Mapping[str, str]) -> str:
    name = wish.name or before.get("NOODLE_MACHINE") or DEFAULT_NAMES[kind]
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"--name {name!r} can not be a machine's name.", cure="Use letters, digits, dots, dashes and underscores."
        )
    if wish.join is not None and wish.join.machine == name:  # stages of one machine share its memory in a plan
        raise ConfigurationError(f"Machine A is called {name} too.", cure="Call this one otherwise, with --name.")
    return name


def _model(wish: Wish, before: Mapping[str, str]) -> str:
    """NOODLE_MODEL as the coordinator's container sees it."""
    if wish.model is None:
        return before.get("NOODLE_MODEL") or str(read_variables({})["NOODLE_MODEL"])
    model = wish.model.replace("\\", "/")
    inside = re.fullmatch(rf"(?:\./|/)?{MODELS_FOLDER}/([^/].*?)/?", model)
    leaves = ".." in model.split("/")
    if inside and not leaves:
        return f"/{MODELS_FOLDER}/{inside[1]}"
    if leaves or model.startswith(("/", ".", "~")) or re.match(r"[A-Za-z]:", model) or model.lower().endswith(".gguf"):
        raise ConfigurationError(
            f"--model {wish.model}: containers see no folder of this machine but {MODELS_FOLDER}/.",
            cure=f"Put the model into {MODELS_FOLDER}/ in this folder, and give --model {MODELS_FOLDER}/NAME.",
        )
    return model


def _ways_to_a(wish: Wish, before: Mapping[str, str]) -> dict[str, str]:
    if wish.join is not None:
        return {"NOODLE_COORDINATOR_URL": wish.join.coordinator_url, "NOODLE_VALKEY_URL": wish.join.valkey_url}
    known = {name: before.get(name, "") for name in ("NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL")}
    if not all(known.values()):
        raise ConfigurationError(
            "Machine b needs --join: the text that says where machine A is, and the secrets of the cluster.",
            cure="`noodle init` on machine A prints it; it prints it again when it is run again.",
        )
    return known


def _ports(kind: Kind, before: Mapping[str, str]) -> dict[str, str]:
    ports = {}
    for what in PORTS[kind]:
        name = f"NOODLE_{what}_PORT"
        default = STAGE_1_PORT_OF_B if (kind, what) == ("b", "STAGE_1") else DEFAULT_PORTS[what]
        ports[name] = before.get(name) or default
    seen: dict[str, str] = {}
    for name, port in ports.items():
        if port in seen:
            raise ConfigurationError(
                f"{seen[port]} and {name} in .env are both {port}.", cure="Give each its own port."
            )
        seen[port] = name
    return ports
