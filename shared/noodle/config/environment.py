"""Reads the configuration of a process from its environment; no other file touches the environment.

A value that fails its check, or a NOODLE_ variable that does not exist, stops the start with an error that names it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from noodle.config import settings
from noodle.config.addresses import host_of
from noodle.config.variables import Variable
from noodle.errors import ConfigurationError
from noodle.model.formats import DTYPE_BY_FORMAT, FORMAT_BY_DTYPE, STORED

log = logging.getLogger(__name__)

MINIMUM_TOKEN_CHARACTERS = 16  # shortest NOODLE_CLUSTER_TOKEN
FILE_CURE = (
    "Write the secret into it. With Docker, `docker compose run --rm init` does, and lets its containers read it."
)

Config = TypeVar("Config", bound=settings.SharedConfig)


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, to read a configuration from or to hand to a child."""
    return dict(os.environ)


def read_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """All variables with their checked values, secrets as text; raises ConfigurationError for a bad name or value."""
    known = [each.name for each in settings.VARIABLES]
    for name in environment:
        if name in settings.RETIRED:
            log.warning("%s has no effect any more: %s. Remove it.", name, settings.RETIRED[name])
        elif name.startswith("NOODLE_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"{name} is not a variable of noodle.",
                cure=f"Did you mean {near[0]}?" if near else "See .env.example for all of them.",
            )
    values: dict[str, Any] = {}
    for each in settings.VARIABLES:
        text = environment.get(each.name, "").strip() or each.default
        try:
            values[each.name] = text if each.file_remark else each.parse(text)
        except ValueError as error:
            raise ConfigurationError(
                f"{each.name} is {text!r}, not {error}.", cure=f"It means: {each.remark}."
            ) from error
    _check_formats(values)
    return values


def _check_formats(values: Mapping[str, Any]) -> None:
    """Refuse number formats that contradict one another."""
    executor, weights, dtype = (values[f"NOODLE_{name}"] for name in ("EXECUTOR", "WEIGHTS", "DTYPE"))
    if values["NOODLE_QUALITY"] == "exact":
        for name, exact in (("WEIGHTS", "f32"), ("KV", "f32"), ("DTYPE", "float32"), ("HOP_DTYPE", "float32")):
            if values[f"NOODLE_{name}"] not in ("auto", exact):
                raise ConfigurationError(
                    f"NOODLE_QUALITY is exact, and NOODLE_{name} is {values[f'NOODLE_{name}']}.",
                    cure=f"Leave NOODLE_{name} at auto, or NOODLE_QUALITY at stored.",
                )
    if executor == "transformers" and weights not in ("auto", STORED, *DTYPE_BY_FORMAT):
        raise ConfigurationError(
            f"NOODLE_EXECUTOR is transformers, which does not compute with NOODLE_WEIGHTS={weights}.",
            cure=f"Choose one of {', '.join(DTYPE_BY_FORMAT)}, or NOODLE_EXECUTOR=ggml.",
        )
    if executor == "transformers" and values["NOODLE_KV"] != "auto":
        raise ConfigurationError(
            f"NOODLE_EXECUTOR is transformers, whose KV rows have the dtype it computes in, and NOODLE_KV is "
            f"{values['NOODLE_KV']}.",
            cure="Leave NOODLE_KV at auto, or choose NOODLE_EXECUTOR=ggml.",
        )
    if dtype != "auto" and values["NOODLE_KV"] != "auto":
        raise ConfigurationError(
            f"NOODLE_DTYPE is {dtype}, which is for transformers, and NOODLE_KV is {values['NOODLE_KV']}, which is for "
            "ggml.",
            cure="Set one of them and leave the other.",
        )
    if dtype != "auto" and weights not in ("auto", FORMAT_BY_DTYPE[dtype]):
        raise ConfigurationError(
            f"NOODLE_DTYPE is {dtype}, and NOODLE_WEIGHTS is {weights}.", cure="Set one of them and leave the other."
        )


def _read(kind: type[Config], environment: Mapping[str, str]) -> Config:
    values = read_variables(environment)
    found = {}
    for each in fields(kind):
        declared: Variable = each.metadata["variable"]
        found[each.name] = declared.parse(_secret(values, declared)) if declared.file_remark else values[declared.name]
    return kind(**found)


def _secret(values: Mapping[str, Any], declared: Variable) -> str:
    """A secret from its variable or its file; empty when neither is set."""
    direct, file_name = str(values[declared.name]), str(values[f"{declared.name}_FILE"])
    if direct and file_name:
        raise ConfigurationError(f"{declared.name} and {declared.name}_FILE are both set.", cure="Keep one of them.")
    if not file_name:
        return direct
    try:
        text = Path(file_name).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(
            f"{declared.name}_FILE names {file_name}, which cannot be read: {error.strerror}.", cure=FILE_CURE
        ) from error
    if not text:
        raise ConfigurationError(f"{declared.name}_FILE names {file_name}, which is empty.", cure=FILE_CURE)
    return text


def _require_token(config: settings.ServiceConfig) -> None:
    if len(config.cluster_token) < MINIMUM_TOKEN_CHARACTERS:
        raise ConfigurationError(
            f"NOODLE_CLUSTER_TOKEN is missing or shorter than {MINIMUM_TOKEN_CHARACTERS} characters.",
            cure="Set the same long random text on every machine of the cluster; `noodle up` makes one by itself.",
        )


def coordinator_config(environment: Mapping[str, str]) -> settings.CoordinatorConfig:
    """The coordinator's configuration; a coordinator that others can reach must have an API key (design D5)."""
    config = _read(settings.CoordinatorConfig, environment)
    _require_token(config)
    if not config.api_keys and not config.bind.is_loopback:
        raise ConfigurationError(
            f"The coordinator would listen on {config.bind}, where others can reach it, without a key.",
            cure="Set NOODLE_API_KEY (or NOODLE_API_KEY_FILE), or bind to 127.0.0.1.",
        )
    has_file = config.metrics_file != Path()
    return config if has_file else replace(config, metrics_file=config.state_dir / "metrics.jsonl")


def planner_config(environment: Mapping[str, str]) -> settings.PlannerConfig:
    config = _read(settings.PlannerConfig, environment)
    _require_token(config)
    if config.split is not None and len(config.split) != config.stage_count:
        raise ConfigurationError(
            f"NOODLE_SPLIT={','.join(map(str, config.split))} names {len(config.split)} stages, "
            f"but NOODLE_STAGES is {config.stage_count}.",
            cure="Make the two agree.",
        )
    return config


def stage_config(environment: Mapping[str, str]) -> settings.StageConfig:
    """A stage's configuration; addresses are configured, never guessed (design D6)."""
    config = _read(settings.StageConfig, environment)
    _require_token(config)
    any_address = ("0.0.0.0", "::")
    if host_of(config.advertise_url) in any_address:
        raise ConfigurationError(
            f"NOODLE_ADVERTISE_URL is {config.advertise_url}, which other machines cannot connect to.",
            cure="Set it to this machine's own address on your network, as http://192.168.1.102:8081.",
        )
    if config.advertise_url:
        return config
    if config.bind.host in any_address:
        raise ConfigurationError(
            f"This stage listens on {config.bind}, which does not tell the other processes where to reach it.",
            cure="Set NOODLE_ADVERTISE_URL to this machine's address, as http://192.168.1.102:8081.",
        )
    return replace(config, advertise_url=f"http://{config.bind}")


def command_config(environment: Mapping[str, str]) -> settings.CommandConfig:
    """The command's configuration; secrets may be missing, since a running `noodle up` keeps its own."""
    return _read(settings.CommandConfig, environment)
