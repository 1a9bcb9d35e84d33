"""Every variable noodle reads, with its unit, default and check; the only file that touches the environment.

A value that means nothing, or a NOODLE_ variable that does not exist, stops the start and is named.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from noodle.addresses import host_of
from noodle.api_keys import ApiKey, read_api_keys
from noodle.errors import ConfigurationError
from noodle.formats import ALLOWANCES, DTYPE_OF, EXECUTORS, OF_DTYPE, WEIGHTS
from noodle.plan import MINIMUM_SESSION_TOKENS
from noodle.wire import HOP_DTYPES

CURE_OF_A_FILE = (
    "Write the secret into it; with Docker `docker compose run --rm init` does, and lets its containers read it."
)


@dataclass(frozen=True)
class Variable:
    """One environment variable: how its text is read, its default (as text) and what it means."""

    name: str
    default: str
    parse: Callable[[str], Any]
    remark: str  # with the unit; .env.example is made of these


@dataclass(frozen=True)
class Address:
    """Where a service listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _text(value: str) -> str:
    return value


def _path(value: str) -> Path:
    return Path(value).expanduser()


def _whole(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        is_whole = re.fullmatch(r"-?[0-9]+", value) is not None
        if not is_whole or not minimum <= int(value) <= maximum:
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return int(value)

    return parse


def _context(value: str) -> int:
    number = int(value)
    if number != 0 and not MINIMUM_SESSION_TOKENS <= number <= 1 << 24:
        least = f"{MINIMUM_SESSION_TOKENS} (a short prompt and its answer)"
        raise ValueError(f"0, or a whole number from {least} to {1 << 24}")
    return number


def _seconds(value: str) -> float:
    number = float(value)
    if not 0 < number <= 86_400:
        raise ValueError("seconds, more than 0 and at most 86400")
    return number


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return value

    return parse


def _address(value: str) -> Address:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("host:port, as 127.0.0.1:8080")
    return Address(host.strip("[]"), int(port))


def _ipv4(value: str) -> str:
    try:
        return str(ipaddress.IPv4Address(value)) if value else value
    except ValueError as error:
        raise ValueError("an IPv4 address, as 192.168.1.101") from error


def _memory(value: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*[mg]", value):
        raise ValueError("megabytes or gigabytes, as 512m or 8g")
    return value


def _url(value: str) -> str:
    if not value:
        return value
    parts = urlsplit(value)
    if parts.scheme not in ("http", "redis") or not parts.hostname or not parts.port:
        raise ValueError("a URL with a port, as http://192.168.1.102:8081")
    return value.rstrip("/")


def _origins(value: str) -> tuple[str, ...]:
    origins = tuple(part.strip() for part in value.split(",") if part.strip())
    for origin in origins:
        parts = urlsplit(origin)
        bare = parts.scheme in ("http", "https") and parts.hostname and origin == f"{parts.scheme}://{parts.netloc}"
        if origin != "*" and not bare:
            raise ValueError("origins as http://192.168.1.101:3000, without a path, or *")
    return origins


def _split(value: str) -> tuple[int, ...] | None:
    if not value:
        return None
    parts = tuple(int(part) for part in value.split(","))
    if any(part < 1 for part in parts):
        raise ValueError("layers per stage, each at least 1, as 10,2")
    return parts


VARIABLES: tuple[Variable, ...] = (
    # what runs
    Variable("NOODLE_MODEL", "SmolLM2-135M-Instruct", _text, "the default's name, a hub id, a folder or a .gguf file"),
    Variable("NOODLE_CONTEXT_LENGTH", "0", _context, "tokens a session may have at most; 0 is the model's"),
    Variable("NOODLE_STAGES", "2", _whole(1, 1024), "stages the planner waits for before it plans"),
    Variable("NOODLE_SPLIT", "", _split, "layers per stage in stage order, as 10,2; empty: by measured speed"),
    # how processes find one another
    Variable("NOODLE_COORDINATOR_BIND", "127.0.0.1:8080", _address, "host:port the coordinator listens on"),
    Variable("NOODLE_PLANNER_BIND", "127.0.0.1:8079", _address, "host:port the planner listens on"),
    Variable("NOODLE_STAGE_BIND", "127.0.0.1:8081", _address, "host:port this stage listens on"),
    Variable("NOODLE_ADVERTISE_URL", "", _url, "URL where others reach this stage; empty: the bind address"),
    Variable("NOODLE_VALKEY_URL", "redis://127.0.0.1:6379", _url, "URL of Valkey or Redis"),
    Variable("NOODLE_PLANNER_URL", "http://127.0.0.1:8079", _url, "URL where the coordinator reaches the planner"),
    Variable(
        "NOODLE_COORDINATOR_URL",
        "http://127.0.0.1:8080",
        _url,
        "URL of the coordinator, for commands and stages",
    ),
    Variable(
        "NOODLE_TRANSPORT",
        "auto",
        _one_of("auto", "direct", "queue"),
        "how steps travel: by connections (direct), by Valkey and references (queue) or by both; everywhere the same",
    ),
    # locks
    Variable("NOODLE_CLUSTER_TOKEN", "", _text, "secret the machines share; or NOODLE_CLUSTER_TOKEN_FILE"),
    Variable("NOODLE_CLUSTER_TOKEN_FILE", "", _text, "file with that secret"),
    Variable(
        "NOODLE_API_KEY",
        "",
        _text,
        "key clients send, or several as name:key,name:key; needed unless the coordinator listens on loopback",
    ),
    Variable("NOODLE_API_KEY_FILE", "", _text, "file with that key, or with several, one a line"),
    Variable("NOODLE_CORS_ORIGINS", "", _origins, "origins whose web pages may ask, with commas between; * is all"),
    Variable("NOODLE_VALKEY_PASSWORD", "", _text, "Valkey's password; or NOODLE_VALKEY_PASSWORD_FILE"),
    Variable("NOODLE_VALKEY_PASSWORD_FILE", "", _text, "file with that password"),
    # a stage
    Variable("NOODLE_STAGE_ID", "0", _whole(0, 1023), "this stage's number; stages stand in this order"),
    Variable("NOODLE_MACHINE", "", _text, "name of this machine; empty: its host name"),
    Variable("NOODLE_DEVICE", "auto", _one_of("auto", "cpu", "cuda"), "where this stage computes"),
    Variable(
        "NOODLE_DTYPE",
        "auto",
        _one_of("auto", "float32", "float16", "bfloat16"),
        "number format transformers computes in; auto: float32 on a CPU, what the card does natively on a GPU",
    ),
    Variable(
        "NOODLE_EXECUTOR",
        "auto",
        _one_of("auto", *EXECUTORS),
        "what computes this stage's layers; auto: whichever is measured to be faster here",
    ),
    Variable(
        "NOODLE_WEIGHTS",
        "auto",
        _one_of("auto", *WEIGHTS),
        "format of this stage's weights; auto: the fastest one that NOODLE_QUALITY allows",
    ),
    Variable(
        "NOODLE_QUALITY",
        "near-lossless",
        _one_of(*ALLOWANCES),
        "how near to float32 a model must stay: exact, at most 1 % more perplexity, or 10 % (small)",
    ),
    Variable(
        "NOODLE_HOP_DTYPE",
        "auto",
        _one_of("auto", *HOP_DTYPES),
        "format of what goes from stage to stage; auto: as computed, 16 bits over slow links; int8: prompts alone",
    ),
    Variable("NOODLE_THREADS", "0", _whole(0, 1024), "threads this stage computes with; 0: one per core it may use"),
    Variable("NOODLE_KV_BYTES", "0", _whole(0, 1 << 50), "bytes for KV rows on this stage; 0: half of what is free"),
    # a request
    Variable("NOODLE_MAX_OPEN_REQUESTS", "64", _whole(1, 4096), "requests computed at the same time"),
    Variable("NOODLE_MAX_WAITING_REQUESTS", "128", _whole(0, 65536), "requests that may wait; more get 429"),
    Variable(
        "NOODLE_MAX_REQUESTS_PER_KEY",
        "0",
        _whole(0, 4096),
        "requests of one API key in progress; more get 429; 0: all",
    ),
    Variable("NOODLE_MAX_BODY_BYTES", str(8 << 20), _whole(1024, 1 << 30), "bytes of a request's body; more get 413"),
    Variable("NOODLE_STEP_TOKENS", "512", _whole(1, 8192), "tokens in one step; longer prompts go in chunks of it"),
    Variable(
        "NOODLE_STAGE_RETURN_SECONDS",
        "20",
        _seconds,
        "how long a stage may be silent until the planner gives its layers to the others, if they have room",
    ),
    Variable(
        "NOODLE_PREFIX_CACHE",
        "on",
        _one_of("on", "off"),
        "whether KV rows of ended requests are kept, until their room is needed, for prompts that begin alike",
    ),
    Variable("NOODLE_RECOVERY_SECONDS", "120", _seconds, "how long an open request waits for a lost stage to return"),
    # where things are kept
    Variable("NOODLE_CACHE_DIR", "~/.cache/noodle", _path, "converted models and measurements; safe to delete"),
    Variable("NOODLE_REPORTS_DIR", "~/.local/share/noodle/reports", _path, "reports that the coordinator keeps"),
    Variable(
        "NOODLE_STATE_DIR",
        "~/.local/state/noodle",
        _path,
        "what a running `noodle up` keeps, metrics.jsonl, and what a stage has not been able to send to it",
    ),
    Variable("NOODLE_METRICS_FILE", "", _text, "file of POST /log_metrics; empty: metrics.jsonl in NOODLE_STATE_DIR"),
    Variable("NOODLE_LOG_FORMAT", "pretty", _one_of("pretty", "json"), "how log lines are written"),
    # ports of `noodle up`, and where containers publish theirs
    Variable("NOODLE_COORDINATOR_PORT", "8080", _whole(1, 65535), "`noodle up` and containers: the coordinator's port"),
    Variable("NOODLE_PLANNER_PORT", "8079", _whole(1, 65535), "`noodle up`: port of the planner"),
    Variable("NOODLE_FIRST_STAGE_PORT", "8081", _whole(1, 65535), "`noodle up`: port of stage 0; the others follow"),
    Variable("NOODLE_VALKEY_PORT", "6379", _whole(1, 65535), "`noodle up` and containers: port of Valkey"),
    # containers; `noodle init` writes these into .env, compose reads them
    Variable("NOODLE_LAN_ADDRESS", "", _ipv4, "containers: this machine's IPv4 address, where its ports are published"),
    Variable("NOODLE_PEER_ADDRESS", "", _ipv4, "containers: the other machine's IPv4 address"),
    Variable("NOODLE_STAGE_0_PORT", "8081", _whole(1, 65535), "containers: published port of stage 0"),
    Variable(
        "NOODLE_STAGE_1_PORT", "8082", _whole(1, 65535), "containers: published port of stage 1; 8081 on machine B"
    ),
    Variable("NOODLE_GRAFANA_PORT", "3000", _whole(1, 65535), "containers: published port of Grafana"),
    Variable("NOODLE_STAGE_MEMORY", "8g", _memory, "containers: memory a stage may take, as 512m or 8g"),
)
_BY_NAME = {variable.name: variable for variable in VARIABLES}


def read_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """All variables with their checked values; raises ConfigurationError for an unknown name or a bad value."""
    for name in environment:
        if name.startswith("NOODLE_") and name not in _BY_NAME:
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
    if executor == "transformers" and weights not in ("auto", *DTYPE_OF):
        raise ConfigurationError(
            f"NOODLE_EXECUTOR is transformers, which does not compute with NOODLE_WEIGHTS={weights}.",
            cure=f"Choose one of {', '.join(DTYPE_OF)}, or NOODLE_EXECUTOR=ggml.",
        )
    if dtype != "auto" and weights not in ("auto", OF_DTYPE[dtype]):
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
    hop_dtype: str = "auto"
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
        metrics_file=_path(values["NOODLE_METRICS_FILE"] or str(values["NOODLE_STATE_DIR"] / "metrics.jsonl")),
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
        hop_dtype=values["NOODLE_HOP_DTYPE"],
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


def env_example() -> str:
    """The text of .env.example: every variable with its remark and default; a test holds the file to it."""
    lines = [
        "# Every variable of noodle, with its unit and default. `noodle init` makes .env; add there what you need.",
        "",
    ]
    for variable in VARIABLES:
        lines += [f"# {variable.remark}", f"#{variable.name}={variable.default}", ""]
    return "\n".join(lines)
