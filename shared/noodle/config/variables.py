"""The list of every variable that noodle reads: its unit, default and check; reads no environment."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from noodle.cluster.plan import MINIMUM_SESSION_TOKENS
from noodle.model.formats import ALLOWANCES, EXECUTORS, WEIGHTS
from noodle.wire.frames import ACTIVATION_DTYPES


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


def path_of(value: str) -> Path:
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
    Variable(
        "NOODLE_DEVICE",
        "auto",
        _one_of("auto", "cpu", "cuda", "vulkan"),
        "where this stage computes; vulkan: by a ggml built for it",
    ),
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
        _one_of("auto", *ACTIVATION_DTYPES),
        "format of what goes from stage to stage; auto: as computed, 16 bits over slow links; int8: prompts alone",
    ),
    Variable(
        "NOODLE_THREADS",
        "0",
        _whole(0, 1024),
        "threads this stage may compute with: all, or half where that is faster; 0: one per core it may use",
    ),
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
    Variable("NOODLE_CACHE_DIR", "~/.cache/noodle", path_of, "converted models and measurements; safe to delete"),
    Variable("NOODLE_REPORTS_DIR", "~/.local/share/noodle/reports", path_of, "reports that the coordinator keeps"),
    Variable(
        "NOODLE_STATE_DIR",
        "~/.local/state/noodle",
        path_of,
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


def env_example() -> str:
    """The text of .env.example: every variable with its remark and default; a test holds the file to it."""
    lines = [
        "# Every variable of noodle, with its unit and default. `noodle init` makes .env; add there what you need.",
        "",
    ]
    for variable in VARIABLES:
        lines += [f"# {variable.remark}", f"#{variable.name}={variable.default}", ""]
    return "\n".join(lines)
