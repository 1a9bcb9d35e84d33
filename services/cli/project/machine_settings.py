"""The values of .env for a machine, from the options of `noodle init`, the values before, and the join line."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from noodle.config.environment import read_variables
from noodle.errors import ConfigurationError
from services.cli.project.join_line import Join
from services.cli.project.project import COMPOSE_NAME, LOOPBACK, ROLES, Project, Role

STAGES_OF_SINGLE = 2  # stage services of docker-compose.yml for one host
LAN_FILE, GPU_FILE = "docker-compose.lan.yml", "docker-compose.gpu.yml"
SEPARATOR = ":"  # of COMPOSE_FILE; the default on Windows is another one
MODELS_FOLDER = "models"  # in the project; the coordinator's container sees it as /models
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class InitOptions:
    """The options of `noodle init`; None if not given."""

    machine: Role | None = None
    address: str | None = None
    peer: str | None = None
    join: Join | None = None
    gpu: bool | None = None
    stages: int | None = None
    model: str | None = None
    name: str | None = None


def settings(options: InitOptions, before: Mapping[str, str], cores: int) -> dict[str, str]:
    """Return the values of .env in their order; `before` is what it holds now.

    Raises ConfigurationError for options that contradict one another, the kind of machine, or what this folder is.
    """
    read_variables({name: value for name, value in before.items() if name.startswith("NOODLE_")})
    role = _role(options, before)
    _refuse_options_of_another_role(role, options)
    address, peer = _addresses(role, options, before)
    values = {
        "COMPOSE_PROJECT_NAME": before.get("COMPOSE_PROJECT_NAME") or "noodle",
        "COMPOSE_PROFILES": role,
        "COMPOSE_FILE": SEPARATOR.join(_files(role, options, before)),
        "COMPOSE_PATH_SEPARATOR": SEPARATOR,
        "NOODLE_MACHINE": _name(role, options, before),
        "NOODLE_LAN_ADDRESS": address,
        "NOODLE_PEER_ADDRESS": peer,
    }
    if role == "b":
        values |= _urls_of_a(options, before)
    else:
        stages = options.stages or int(before.get("NOODLE_STAGES") or STAGES_OF_SINGLE)
        if role == "single" and stages != STAGES_OF_SINGLE:
            raise ConfigurationError(
                f"--stages {stages}: docker-compose.yml has {STAGES_OF_SINGLE} stages for one host.",
                cure=f"Leave it out, or run `noodle up --stages {stages}` without Docker.",
            )
        values["NOODLE_STAGES"] = str(stages)
        values["NOODLE_MODEL"] = _model(options, before)
    if role == "single":  # two stages share this host; a stage that is alone on a machine uses all cores by default
        values["NOODLE_THREADS"] = before.get("NOODLE_THREADS") or str(max(1, cores // STAGES_OF_SINGLE))
    values |= _ports(role, before)
    read_variables({name: value for name, value in values.items() if name.startswith("NOODLE_")})
    return values


def _role(options: InitOptions, before: Mapping[str, str]) -> Role:
    profiles = before.get("COMPOSE_PROFILES", "")
    was = next((role for role in ROLES if role in profiles.split(",")), None)
    if profiles and was is None:
        raise ConfigurationError(
            f"COMPOSE_PROFILES in .env is {profiles!r}, which is no machine of noodle.",
            cure="Delete that line, or write single, a or b.",
        )
    if options.machine is not None and was is not None and options.machine != was:
        raise ConfigurationError(
            f"This folder is machine {was!r} by its .env, not {options.machine!r} as in --machine.",
            cure="Use another folder, or stop it (docker compose down) and delete .env and secrets/ first.",
        )
    return options.machine or was or ("b" if options.join is not None else "single")


def _refuse_options_of_another_role(role: Role, options: InitOptions) -> None:
    reasons = {
        "single": {
            "--address": "it is reached only on 127.0.0.1",
            "--peer": "there is no other machine",
            "--join": "there is no other machine",
        },
        "a": {"--join": "machine B joins machine A"},
        "b": {
            "--peer": "the join line says where machine A is",
            "--gpu": "docker-compose.gpu.yml is for the stage of machine A",
            "--stages": "machine A decides the number of stages",
            "--model": "machine A decides which model is served and sends its weights",
        },
    }
    for option, reason in reasons[role].items():
        if getattr(options, option.removeprefix("--")) not in (None, False):  # --no-gpu asks for nothing
            raise ConfigurationError(f"{option} means nothing with --machine {role}: {reason}.", cure="Leave it out.")


def _addresses(role: Role, options: InitOptions, before: Mapping[str, str]) -> tuple[str, str]:
    """Return this machine's address and the other one's."""
    if role == "single":
        return LOOPBACK, ""
    known_address, known_peer = before.get("NOODLE_LAN_ADDRESS", ""), before.get("NOODLE_PEER_ADDRESS", "")
    if role == "a":
        address, peer = options.address or known_address, options.peer or known_peer
    else:
        address = options.address or known_address or (options.join.peer_address if options.join else "")
        peer = options.join.address if options.join else known_peer
    for option, value in (("--address", address), ("--peer", peer)):
        if not value and not (role == "b" and option == "--peer"):
            raise ConfigurationError(
                f"Machine {role} needs {option}: the IPv4 address of "
                f"{'this machine' if option == '--address' else 'the other machine'} on your network.",
                cure="Give both machines a fixed address: --machine a --address 192.168.1.101 --peer 192.168.1.102.",
            )
        if value:
            _check_address(option, value)
    if address == peer:
        raise ConfigurationError(
            f"This machine and the other one have the same address, {address}.",
            cure="Give this machine's with --address" + (", and the other one's with --peer." if role == "a" else "."),
        )
    return address, peer


def _check_address(option: str, value: str) -> None:
    try:
        address = ipaddress.IPv4Address(value)
        is_local = address.is_loopback or address.is_unspecified or address.is_multicast
        reason = "cannot be reached from another machine" if is_local else ""
    except ValueError:
        reason = "is not an IPv4 address"
    if reason:
        raise ConfigurationError(
            f"{option} {value} {reason}.",
            cure="Give the machine's address on your network, as 192.168.1.101 (`ip -4 address`, or `ipconfig`).",
        )


def _files(role: Role, options: InitOptions, before: Mapping[str, str]) -> list[str]:
    separator = before.get("COMPOSE_PATH_SEPARATOR") or SEPARATOR
    had = [name for name in before.get("COMPOSE_FILE", "").split(separator) if name]
    has_gpu = GPU_FILE in had if options.gpu is None else options.gpu
    ours = [COMPOSE_NAME, *([LAN_FILE] if role != "single" else []), *([GPU_FILE] if has_gpu else [])]
    return [*ours, *(name for name in had if name not in (COMPOSE_NAME, LAN_FILE, GPU_FILE))]


def _name(role: Role, options: InitOptions, before: Mapping[str, str]) -> str:
    name = options.name or before.get("NOODLE_MACHINE") or ("machine-b" if role == "b" else "machine-a")
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"--name {name!r} is not a valid machine name.", cure="Use letters, digits, dots, dashes and underscores."
        )
    if options.join is not None and options.join.machine == name:  # stages of one machine share its memory in a plan
        raise ConfigurationError(f"Machine A is called {name} too.", cure="Give this machine another name with --name.")
    return name


def _model(options: InitOptions, before: Mapping[str, str]) -> str:
    """Return NOODLE_MODEL as the coordinator's container sees it."""
    if options.model is None:
        return before.get("NOODLE_MODEL") or str(read_variables({})["NOODLE_MODEL"])
    model = options.model.replace("\\", "/")
    inside = re.fullmatch(rf"(?:\./|/)?{MODELS_FOLDER}/([^/].*?)/?", model)
    leaves = ".." in model.split("/")
    if inside and not leaves:
        return f"/{MODELS_FOLDER}/{inside[1]}"
    if leaves or model.startswith(("/", ".", "~")) or re.match(r"[A-Za-z]:", model) or model.lower().endswith(".gguf"):
        raise ConfigurationError(
            f"--model {options.model}: containers see only the folder {MODELS_FOLDER}/ of this machine.",
            cure=f"Put the model into {MODELS_FOLDER}/ in this folder, and give --model {MODELS_FOLDER}/NAME.",
        )
    return model


def _urls_of_a(options: InitOptions, before: Mapping[str, str]) -> dict[str, str]:
    if options.join is not None:
        return {"NOODLE_COORDINATOR_URL": options.join.coordinator_url, "NOODLE_VALKEY_URL": options.join.valkey_url}
    known = {name: before.get(name, "") for name in ("NOODLE_COORDINATOR_URL", "NOODLE_VALKEY_URL")}
    if not all(known.values()):
        raise ConfigurationError(
            "Machine b needs --join: the join line with machine A's address and the secrets of the cluster.",
            cure="`noodle init` on machine A prints it. Run it again to see it again.",
        )
    return known


def _ports(role: Role, before: Mapping[str, str]) -> dict[str, str]:
    """Return the ports as .env has them, with the defaults of this role."""
    defaults = Project(Path(), role, {}).published()
    ports = {each.variable: before.get(each.variable) or str(each.port) for each in defaults}
    seen: dict[str, str] = {}
    for name, port in ports.items():
        if port in seen:
            raise ConfigurationError(
                f"{seen[port]} and {name} in .env are both {port}.", cure="Give each its own port."
            )
        seen[port] = name
    return ports
