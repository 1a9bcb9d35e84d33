"""What each service and the command are told by the environment; the only file that touches it.

A value that means nothing, or a NOODLE_ variable that does not exist, stops the start and is named.
"""

from __future__ import annotations

import difflib
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.config.addresses import host_of
from noodle.config.api_keys import ApiKey, read_api_keys
from noodle.config.variables import VARIABLES, Address, path_of
from noodle.errors import ConfigurationError
from noodle.model.formats import DTYPE_BY_FORMAT, FORMAT_BY_DTYPE

CURE_OF_A_FILE = (
    "Write the secret into it; with Docker `docker compose run --rm init` does, and lets its containers read it."
)


log = logging.getLogger(__name__)

_BY_NAME = {variable.name: variable for variable in VARIABLES}
_RETIRED = {"NOODLE_STAY_AWAKE": "a stage no longer keeps a core awake"}  # an older .env may still set them


def read_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """All variables with their checked values; raises ConfigurationError for an unknown name or a bad value."""
    for name in environment:
        if name in _RETIRED:
            log.warning("%s has no effect any more: %s. Remove it.", name, _RETIRED[name])
        elif name.startswith("NOODLE_") and name not in _BY_NAME:
            near = difflib.get_close_matches(name, _BY_NAME, n=1)
            raise ConfigurationError(
                f"{name} is not a variable of noodle.",
                cure=f"Did you mean {near[0]}?" if near else "See .env.example for all of them.",
            )
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = environment.get(variable.name, "").strip() or variable.default
        try:
            values[variable.name] = variable.parse(text)
        except ValueError as error:
            raise ConfigurationError(
                f"{variable.name} is {text!r}: {error}.", cure=f"It means: {variable.remark}."
            ) from error
    _check_formats(values)
    return values


def _check_formats(values: Mapping[str, Any]) -> None:
    """Refuse wishes for number formats that contradict one another."""
    executor, weights, dtype = (values[f"NOODLE_{name}"] for name in ("EXECUTOR", "WEIGHTS", "DTYPE"))
    if values["NOODLE_QUALITY"] == "exact":
        for name, exact in (("WEIGHTS", "f32"), ("DTYPE", "float32"), ("HOP_DTYPE", "float32")):
            if values[f"NOODLE_{name}"] not in ("auto", exact):
                raise ConfigurationError(
                    f"NOODLE_QUALITY is exact, and NOODLE_{name} is {values[f'NOODLE_{name}']}.",
                    cure=f"Leave NOODLE_{name} at auto, or choose near-lossless.",
                )
    if executor == "transformers" and weights not in ("auto", *DTYPE_BY_FORMAT):
        raise ConfigurationError(
            f"NOODLE_EXECUTOR is transformers, which does not compute with NOODLE_WEIGHTS={weights}.",
            cure=f"Choose one of {', '.join(DTYPE_BY_FORMAT)}, or NOODLE_EXECUTOR=ggml.",
        )
    if dtype != "auto" and weights not in ("auto", FORMAT_BY_DTYPE[dtype]):
        raise ConfigurationError(
            f"NOODLE_DTYPE is {dtype}, and NOODLE_WEIGHTS is {weights}.", cure="Set one of them, and leave the other."
        )


def _secret(values: Mapping[str, Any], name: str) -> str:
    """A secret from its variable, or from the file that NAME_FILE names; empty when neither is set."""
    direct, file_name = str(values[name]), str(values[name + "_FILE"])
    if direct and file_name:
        raise ConfigurationError(f"{name} and {name}_FILE are both set.", cure="Keep one of them.")
    if not file_name:
        return direct
    try:
        secret = Path(file_name).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(
            f"{name}_FILE names {file_name}, which can not be read: {error.strerror}.", cure=CURE_OF_A_FILE
        ) from error
    if not secret:
        raise ConfigurationError(f"{name}_FILE names {file_name}, which is empty.", cure=CURE_OF_A_FILE)
    return secret


def _cluster_token(values: Mapping[str, Any]) -> str:
    token = _secret(values, "NOODLE_CLUSTER_TOKEN")
    if len(token) < 16:
        raise ConfigurationError(
            "NOODLE_CLUSTER_TOKEN is missing or shorter than 16 characters.",
            cure="Give every machine of the cluster the same long random text; `noodle up` makes one by itself.",
        )
    return token


def _machine_name(values: Mapping[str, Any]) -> str:
    return str(values["NOODLE_MACHINE"]) or platform.node() or "machine"


@dataclass(frozen=True)
class ServiceConfig:
    """What all three services are told."""

    bind: Address
    cluster_token: str
    valkey_url: str
    valkey_password: str
    model: str
    cache_dir: Path
    log_format: str
    transport: str  # auto, direct or queue
    machine: str


@dataclass(frozen=True)
class CoordinatorConfig(ServiceConfig):
    """What the coordinator is told; sizes in bytes or tokens as named."""

    api_keys: tuple[ApiKey, ...]  # empty: no key is asked for (loopback only)
    cors_origins: tuple[str, ...]
    maximum_requests_per_key: int  # 0: no limit
    maximum_open_requests: int
    maximum_waiting_requests: int
    maximum_body_bytes: int
    step_tokens: int
    recovery_seconds: float
    keeps_prefixes: bool
    reports_dir: Path
    planner_url: str
    metrics_file: Path


@dataclass(frozen=True)
class PlannerConfig(ServiceConfig):
    """What the planner is told."""

    coordinator_url: str  # asked for the model's shape where its folder is not here
    stage_count: int
    stage_return_seconds: float
    split: tuple[int, ...] | None
    context_length: int | None
    activation_dtype: str = "auto"
    quality: str = "near-lossless"


@dataclass(frozen=True)
class StageConfig(ServiceConfig):
    """What a stage is told."""

    coordinator_url: str  # asked for weights where the model's folder is not here
    stage_id: int
    advertise_url: str
    state_dir: Path
    device: str
    dtype: str
    threads: int  # 0: one per core
    kv_bytes: int  # 0: half of what is free
    executor: str = "auto"
    weights: str = "auto"
    quality: str = "near-lossless"


@dataclass(frozen=True)
class CommandConfig:
    """What the noodle command is told."""

    model: str
    split: str
    coordinator_port: int
    planner_port: int
    first_stage_port: int
    valkey_port: int
    state_dir: Path
    cache_dir: Path
    coordinator_url: str
    stage_url: str  # of this machine's stage
    api_key: str  # the first, where several are set
    cluster_token: str
    valkey_password: str
    machine: str
    threads: int
    device: str
    dtype: str
    step_tokens: int


def _service_values(values: Mapping[str, Any], bind_name: str) -> dict[str, Any]:
    return {
        "bind": values[bind_name],
        "cluster_token": _cluster_token(values),
        "valkey_url": values["NOODLE_VALKEY_URL"],
        "valkey_password": _secret(values, "NOODLE_VALKEY_PASSWORD"),
        "model": values["NOODLE_MODEL"],
        "cache_dir": values["NOODLE_CACHE_DIR"],
        "log_format": values["NOODLE_LOG_FORMAT"],
        "transport": values["NOODLE_TRANSPORT"],
        "machine": _machine_name(values),
    }


def coordinator_config(environment: Mapping[str, str]) -> CoordinatorConfig:
    """The coordinator's configuration; a coordinator that others can reach must have an API key (design D5)."""
    values = read_variables(environment)
    api_keys = read_api_keys(_secret(values, "NOODLE_API_KEY"))
    bind: Address = values["NOODLE_COORDINATOR_BIND"]
    if not api_keys and not bind.is_loopback:
        raise ConfigurationError(
            f"The coordinator would listen on {bind}, where others can reach it, without a key.",
            cure="Set NOODLE_API_KEY (or NOODLE_API_KEY_FILE), or bind to 127.0.0.1.",
        )
    return CoordinatorConfig(
        **_service_values(values, "NOODLE_COORDINATOR_BIND"),
        api_keys=api_keys,
        cors_origins=values["NOODLE_CORS_ORIGINS"],
        maximum_requests_per_key=values["NOODLE_MAX_REQUESTS_PER_KEY"],
        maximum_open_requests=values["NOODLE_MAX_OPEN_REQUESTS"],
        maximum_waiting_requests=values["NOODLE_MAX_WAITING_REQUESTS"],
        maximum_body_bytes=values["NOODLE_MAX_BODY_BYTES"],
        step_tokens=values["NOODLE_STEP_TOKENS"],
        recovery_seconds=values["NOODLE_RECOVERY_SECONDS"],
        keeps_prefixes=values["NOODLE_PREFIX_CACHE"] == "on",
        reports_dir=values["NOODLE_REPORTS_DIR"],
        planner_url=values["NOODLE_PLANNER_URL"],
        metrics_file=path_of(values["NOODLE_METRICS_FILE"] or str(values["NOODLE_STATE_DIR"] / "metrics.jsonl")),
    )


def planner_config(environment: Mapping[str, str]) -> PlannerConfig:
    """The planner's configuration."""
    values = read_variables(environment)
    split = values["NOODLE_SPLIT"]
    if split is not None and len(split) != values["NOODLE_STAGES"]:
        raise ConfigurationError(
            f"NOODLE_SPLIT={','.join(map(str, split))} names {len(split)} stages, "
            f"but NOODLE_STAGES is {values['NOODLE_STAGES']}.",
            cure="Make the two agree.",
        )
    return PlannerConfig(
        **_service_values(values, "NOODLE_PLANNER_BIND"),
        coordinator_url=values["NOODLE_COORDINATOR_URL"],
        stage_count=values["NOODLE_STAGES"],
        stage_return_seconds=values["NOODLE_STAGE_RETURN_SECONDS"],
        split=split,
        context_length=values["NOODLE_CONTEXT_LENGTH"] or None,
        activation_dtype=values["NOODLE_HOP_DTYPE"],
        quality=values["NOODLE_QUALITY"],
    )


def stage_config(environment: Mapping[str, str]) -> StageConfig:
    """A stage's configuration; addresses are configured, never guessed (design D6)."""
    values = read_variables(environment)
    bind: Address = values["NOODLE_STAGE_BIND"]
    advertise_url = values["NOODLE_ADVERTISE_URL"]
    if not advertise_url:
        if bind.host in ("0.0.0.0", "::"):
            raise ConfigurationError(
                f"This stage listens on {bind}, which says nothing about where the others find it.",
                cure="Set NOODLE_ADVERTISE_URL to this machine's address, as http://192.168.1.102:8081.",
            )
        advertise_url = f"http://{bind}"
    elif host_of(advertise_url) in ("0.0.0.0", "::"):
        raise ConfigurationError(
            f"NOODLE_ADVERTISE_URL is {advertise_url}, and nobody can be found at an address that means every address.",
            cure="Write this machine's own address on your network, as http://192.168.1.102:8081.",
        )
    return StageConfig(
        **_service_values(values, "NOODLE_STAGE_BIND"),
        coordinator_url=values["NOODLE_COORDINATOR_URL"],
        stage_id=values["NOODLE_STAGE_ID"],
        advertise_url=advertise_url,
        state_dir=values["NOODLE_STATE_DIR"],
        device=values["NOODLE_DEVICE"],
        dtype=values["NOODLE_DTYPE"],
        threads=values["NOODLE_THREADS"],
        kv_bytes=values["NOODLE_KV_BYTES"],
        executor=values["NOODLE_EXECUTOR"],
        weights=values["NOODLE_WEIGHTS"],
        quality=values["NOODLE_QUALITY"],
    )


def command_config(environment: Mapping[str, str]) -> CommandConfig:
    """The configuration of the noodle command; secrets may be absent, a running `noodle up` has its own."""
    values = read_variables(environment)
    api_keys = read_api_keys(_secret(values, "NOODLE_API_KEY"))
    return CommandConfig(
        model=values["NOODLE_MODEL"],
        split=",".join(map(str, values["NOODLE_SPLIT"] or ())),
        coordinator_port=values["NOODLE_COORDINATOR_PORT"],
        planner_port=values["NOODLE_PLANNER_PORT"],
        first_stage_port=values["NOODLE_FIRST_STAGE_PORT"],
        valkey_port=values["NOODLE_VALKEY_PORT"],
        state_dir=values["NOODLE_STATE_DIR"],
        cache_dir=values["NOODLE_CACHE_DIR"],
        coordinator_url=values["NOODLE_COORDINATOR_URL"],
        stage_url=values["NOODLE_ADVERTISE_URL"] or f"http://{values['NOODLE_STAGE_BIND']}",
        api_key=api_keys[0].key if api_keys else "",
        cluster_token=_secret(values, "NOODLE_CLUSTER_TOKEN"),
        valkey_password=_secret(values, "NOODLE_VALKEY_PASSWORD"),
        machine=_machine_name(values),
        threads=values["NOODLE_THREADS"],
        device=values["NOODLE_DEVICE"],
        dtype=values["NOODLE_DTYPE"],
        step_tokens=values["NOODLE_STEP_TOKENS"],
    )


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, to read a configuration from or to hand to a child."""
    return dict(os.environ)
