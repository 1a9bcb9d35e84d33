"""Every variable of noodle, declared once, in the configuration of the processes that read it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields
from pathlib import Path

from noodle.config import variables as of
from noodle.config.addresses import Address
from noodle.config.api_keys import ApiKey, read_api_keys
from noodle.config.variables import Variable, variable
from noodle.model.formats import EXECUTORS, FORMAT_BY_DTYPE, KV_FORMATS, WEIGHTS
from noodle.wire.frames import ACTIVATION_DTYPES


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """Settings of every service and of the noodle command."""

    model: str = variable(
        "NOODLE_MODEL", "SmolLM2-135M-Instruct", str, "name of the default model, a hub id, a folder or a .gguf file"
    )
    machine: str = variable(
        "NOODLE_MACHINE",
        "",
        lambda text: text or platform.node() or "machine",
        "name of this machine; empty: its host name",
    )
    cluster_token: str = variable(
        "NOODLE_CLUSTER_TOKEN",
        "",
        str,
        "secret that the machines share; or NOODLE_CLUSTER_TOKEN_FILE",
        file_remark="file with that secret",
    )
    valkey_password: str = variable(
        "NOODLE_VALKEY_PASSWORD",
        "",
        str,
        "password of Valkey; or NOODLE_VALKEY_PASSWORD_FILE",
        file_remark="file with that password",
    )
    cache_dir: Path = variable(
        "NOODLE_CACHE_DIR", "~/.cache/noodle", of.path, "models and measurements; safe to delete"
    )


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(SharedConfig):
    """Settings of every service."""

    bind: Address
    valkey_url: str = variable("NOODLE_VALKEY_URL", "redis://127.0.0.1:6379", of.url, "URL of Valkey or Redis")
    transport: str = variable(
        "NOODLE_TRANSPORT",
        "auto",
        of.choice("auto", "direct", "queue"),
        "how steps travel: by connections (direct), through Valkey (queue) or both; the same on every machine",
    )
    log_format: str = variable("NOODLE_LOG_FORMAT", "pretty", of.choice("pretty", "json"), "format of log lines")


@dataclass(frozen=True, kw_only=True)
class StateFolder:
    """Settings of the coordinator, a stage and the command."""

    state_dir: Path = variable(
        "NOODLE_STATE_DIR",
        "~/.local/state/noodle",
        of.path,
        "state of a running `noodle up`, metrics.jsonl, and metrics that a stage has not sent yet",
    )


@dataclass(frozen=True, kw_only=True)
class CoordinatorUrl:
    """Settings of the planner, a stage and the command."""

    coordinator_url: str = variable("NOODLE_COORDINATOR_URL", "http://127.0.0.1:8080", of.url, "URL of the coordinator")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Settings of the coordinator and the command."""

    api_keys: tuple[ApiKey, ...] = variable(
        "NOODLE_API_KEY",
        "",
        read_api_keys,
        "key that clients send, or several as name:key,name:key; required unless the coordinator listens on loopback",
        file_remark="file with that key, or with several, one a line",
    )
    step_tokens: int = variable(
        "NOODLE_STEP_TOKENS", "512", of.whole(1, 8192), "tokens in one step; longer prompts are computed in chunks"
    )


@dataclass(frozen=True, kw_only=True)
class LayerSplit:
    """Settings of the planner and the command."""

    split: tuple[int, ...] | None = variable(
        "NOODLE_SPLIT", "", of.layer_split, "layers per stage in stage order, as 10,2; empty: by measured speed"
    )


@dataclass(frozen=True, kw_only=True)
class ModelQuality:
    """Settings of the planner and a stage."""

    quality: str = variable(
        "NOODLE_QUALITY",
        "stored",
        of.quality,
        "stored: weights as the model's file holds them, KV rows in f16; exact: both in float32",
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Settings of a stage and of the command on its machine."""

    bind: Address = variable("NOODLE_STAGE_BIND", "127.0.0.1:8081", of.address, "host:port that this stage listens on")
    advertise_url: str = variable(
        "NOODLE_ADVERTISE_URL", "", of.url, "URL where the other processes reach this stage; empty: the bind address"
    )
    device: str = variable(
        "NOODLE_DEVICE",
        "auto",
        of.choice("auto", "cpu", "cuda", "vulkan"),
        "device that this stage computes on; vulkan needs a ggml built for it",
    )
    dtype: str = variable(
        "NOODLE_DTYPE",
        "auto",
        of.choice("auto", *FORMAT_BY_DTYPE),
        "number format that transformers computes in; auto: float32 on a CPU, the native format of the card on a GPU",
    )
    threads: int = variable(
        "NOODLE_THREADS",
        "0",
        of.whole(0, 1024),
        "maximum threads of this stage: all, or half where that is faster; 0: one per core that its CPU limit allows",
    )


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig(RequestOptions, StateFolder, ServiceConfig):
    """Settings of the coordinator."""

    bind: Address = variable(
        "NOODLE_COORDINATOR_BIND", "127.0.0.1:8080", of.address, "host:port that the coordinator listens on"
    )
    planner_url: str = variable(
        "NOODLE_PLANNER_URL", "http://127.0.0.1:8079", of.url, "URL where the coordinator reaches the planner"
    )
    cors_origins: tuple[str, ...] = variable(
        "NOODLE_CORS_ORIGINS", "", of.origins, "origins whose web pages may send requests, comma-separated; * is all"
    )
    maximum_open_requests: int = variable(
        "NOODLE_MAX_OPEN_REQUESTS", "64", of.whole(1, 4096), "requests computed at the same time"
    )
    maximum_waiting_requests: int = variable(
        "NOODLE_MAX_WAITING_REQUESTS", "128", of.whole(0, 65536), "requests that may wait; more get 429"
    )
    maximum_requests_per_key: int = variable(
        "NOODLE_MAX_REQUESTS_PER_KEY",
        "0",
        of.whole(0, 4096),
        "requests of one API key in progress; more get 429; 0: all",
    )
    maximum_body_bytes: int = variable(
        "NOODLE_MAX_BODY_BYTES", str(8 << 20), of.whole(1024, 1 << 30), "bytes of a request's body; more get 413"
    )
    recovery_seconds: float = variable(
        "NOODLE_RECOVERY_SECONDS", "120", of.seconds, "seconds that an open request waits for a lost stage to return"
    )
    keeps_prefixes: bool = variable(
        "NOODLE_PREFIX_CACHE",
        "on",
        of.flag,
        "keep KV rows of ended requests for prompts that begin alike, while there is room",
    )
    passes_on_hub_files: bool = variable(
        "NOODLE_HUB_RANGES",
        "off",
        of.flag,
        "keep only the header of a hub's GGUF file, and pass on the tensors that each stage asks for",
    )
    reports_dir: Path = variable(
        "NOODLE_REPORTS_DIR", "~/.local/share/noodle/reports", of.path, "folder of reports that the coordinator keeps"
    )
    metrics_file: Path = variable(
        "NOODLE_METRICS_FILE", "", of.path, "file of POST /log_metrics; empty: metrics.jsonl in NOODLE_STATE_DIR"
    )


@dataclass(frozen=True, kw_only=True)
class PlannerConfig(CoordinatorUrl, LayerSplit, ModelQuality, ServiceConfig):
    """Settings of the planner."""

    bind: Address = variable(
        "NOODLE_PLANNER_BIND", "127.0.0.1:8079", of.address, "host:port that the planner listens on"
    )
    stage_count: int = variable(
        "NOODLE_STAGES", "2", of.whole(1, 1024), "stages that the planner waits for before it plans"
    )
    context_length: int | None = variable(
        "NOODLE_CONTEXT_LENGTH", "0", of.context_length, "maximum tokens of a session; 0: the model's own limit"
    )
    activation_dtype: str = variable(
        "NOODLE_HOP_DTYPE",
        "auto",
        of.choice("auto", *ACTIVATION_DTYPES),
        "number format of activations between stages; auto: as computed, 16 bits over slow links; int8: prompts alone",
    )
    stage_return_seconds: float = variable(
        "NOODLE_STAGE_RETURN_SECONDS",
        "20",
        of.seconds,
        "seconds of silence after which the other stages get its layers, if they have room",
    )


@dataclass(frozen=True, kw_only=True)
class StageConfig(ComputeOptions, CoordinatorUrl, ModelQuality, StateFolder, ServiceConfig):
    """Settings of a stage."""

    stage_id: int = variable(
        "NOODLE_STAGE_ID", "0", of.whole(0, 1023), "number of this stage; the pipeline has this order"
    )
    executor: str = variable(
        "NOODLE_EXECUTOR",
        "auto",
        of.choice("auto", *EXECUTORS),
        "library that computes the layers of this stage; auto: ggml where it computes the model, else transformers",
    )
    weights: str = variable(
        "NOODLE_WEIGHTS",
        "auto",
        of.choice("auto", *WEIGHTS),
        "format of this stage's weights; auto: as the file holds them (stored); others are converted while loading",
    )
    kv_format: str = variable(
        "NOODLE_KV",
        "auto",
        of.choice("auto", *KV_FORMATS),
        "number format of this stage's KV rows, where ggml computes; auto: f16, or f32 where quality is exact",
    )
    kv_bytes: int = variable(
        "NOODLE_KV_BYTES", "0", of.whole(0, 1 << 50), "bytes for KV rows on this stage; 0: half of the free memory"
    )


@dataclass(frozen=True, kw_only=True)
class CommandConfig(RequestOptions, LayerSplit, ComputeOptions, CoordinatorUrl, StateFolder, SharedConfig):
    """Settings of the noodle command."""

    coordinator_port: int = variable(
        "NOODLE_COORDINATOR_PORT", "8080", of.port, "`noodle up` and containers: port of the coordinator"
    )
    planner_port: int = variable("NOODLE_PLANNER_PORT", "8079", of.port, "`noodle up`: port of the planner")
    first_stage_port: int = variable(
        "NOODLE_FIRST_STAGE_PORT", "8081", of.port, "`noodle up`: port of stage 0; the others follow"
    )
    valkey_port: int = variable("NOODLE_VALKEY_PORT", "6379", of.port, "`noodle up` and containers: port of Valkey")

    @property
    def api_key(self) -> str:
        """The first of the keys, empty when there is none."""
        return self.api_keys[0].key if self.api_keys else ""

    @property
    def stage_url(self) -> str:
        return self.advertise_url or f"http://{self.bind}"


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """Settings that `noodle init` writes into .env and compose files read."""

    lan_address: str = variable(
        "NOODLE_LAN_ADDRESS", "", of.ipv4, "containers: IPv4 address of this machine, where its ports are published"
    )
    peer_address: str = variable("NOODLE_PEER_ADDRESS", "", of.ipv4, "containers: IPv4 address of the other machine")
    stage_0_port: int = variable("NOODLE_STAGE_0_PORT", "8081", of.port, "containers: published port of stage 0")
    stage_1_port: int = variable(
        "NOODLE_STAGE_1_PORT", "8082", of.port, "containers: published port of stage 1; 8081 on machine B"
    )
    grafana_port: int = variable("NOODLE_GRAFANA_PORT", "3000", of.port, "containers: published port of Grafana")
    stage_memory: str = variable(
        "NOODLE_STAGE_MEMORY", "8g", of.memory_size, "containers: memory limit of a stage, as 512m or 8g"
    )


CONFIGS = (CoordinatorConfig, PlannerConfig, StageConfig, CommandConfig, ContainerConfig)

RETIRED = {"NOODLE_STAY_AWAKE": "a stage no longer keeps a core awake"}  # an older .env may still set these

_DECLARED: list[Variable] = [each.metadata["variable"] for kind in CONFIGS for each in fields(kind)]
VARIABLES = tuple({each.name: each for one in _DECLARED for each in (one, *one.file_variables)}.values())


def env_example() -> str:
    """The text of .env.example: every variable with its remark and default."""
    lines = [
        "# Every variable of noodle, with its unit and default. `noodle init` makes .env; add there what you need.",
        "",
    ]
    for each in VARIABLES:
        lines += [f"# {each.remark}", f"#{each.name}={each.default}", ""]
    return "\n".join(lines)
