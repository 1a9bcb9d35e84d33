"""Describes this machine and how it computes a model in a MachineReport, in the lifecycle's thread.

Neither torch nor transformers is imported unless transformers computes.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from noodle import __version__
from noodle.cluster.plan import MachineReport
from noodle.config.settings import StageConfig
from noodle.installation import has_transformers
from noodle.model.files import model_digest, read_config
from noodle.web.connectivity import Target, try_service
from services.stage.executors.ggml.backend import keep_float32_on_cards
from services.stage.executors.load import build_of, ggml_hindrance, version_of
from services.stage.selection.benchmark import MeasurementKey, MeasureProgress, measure_machine
from services.stage.selection.device import TORCH_DEVICES, choose_device, choose_dtype, device_name, free_memory
from services.stage.selection.select import ExecutorOptions, candidate_of, choose_executor

log = logging.getLogger(__name__)

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def build_machine_report(config: StageConfig, boot_id: str, model: Path, *, progress: MeasureProgress) -> MachineReport:
    """Choose how this machine computes `model`, and measure it or read an earlier measurement.

    Raises ConfigurationError if nothing that is installed here computes the model as requested.
    """
    progress(0.0, "choosing what computes")
    threads = config.threads or len(os.sched_getaffinity(0))
    options = ExecutorOptions(config.executor, config.weights, config.quality, config.dtype)
    if options.is_exact:
        keep_float32_on_cards()
    has_torch = has_transformers()
    ggml_only = options.asks_for_ggml or not has_torch or model.is_file()
    device = choose_device(config.device, ggml_only=ggml_only, has_torch=has_torch)
    read = read_config(model)
    hindrance = ""
    if not options.asks_for_transformers:
        hindrance = ggml_hindrance(read, device.value, is_asked_for=ggml_only)
    only_ggml = "" if device.value in TORCH_DEVICES else f"NOODLE_DEVICE={device.value}"
    if model.is_file():
        only_ggml = f"{model.name} is a GGUF file"
    executor, why = choose_executor(options, hindrance, only_ggml=only_ggml)
    dtype = choose_dtype(config.dtype, device.value).value if executor == "transformers" else "float32"
    candidate = candidate_of(executor, options, dtype)
    log.info("computing on %s (%s) by %s (%s), %d threads", device.value, device.reason, candidate, why, threads)
    if executor == "transformers":
        from services.stage.executors.transformers.runtime import set_threads

        set_threads(threads)
    memory = free_memory(device.value, executor)
    log.info("%d bytes free (%s)", memory.free_bytes, memory.source)
    name, digest = device_name(device.value, executor), model_digest(model)
    key = MeasurementKey(
        model_digest=digest,
        device=device.value,
        device_name=name,
        candidate=candidate,
        executor_version=build_of(executor),
        threads=threads,
        noodle_version=__version__,
    )
    seconds = measure_machine(
        model,
        _first_of(read, LAYER_COUNT_KEYS),
        _first_of(read, CONTEXT_KEYS),
        key=key,
        cache_dir=config.cache_dir,
        progress=progress,
    )
    return MachineReport(
        stage_id=config.stage_id,
        machine=config.machine,
        url=config.advertise_url,
        boot_id=boot_id,
        noodle_version=__version__,
        model_digest=digest,
        device=device.value,
        device_name=name,
        threads=threads,
        free_bytes=memory.free_bytes,
        executor_version=version_of(executor),
        link_bytes_per_second=link_bytes_per_second(config),
        choice=f"{candidate} ({why})",
        **asdict(candidate),
        **asdict(seconds if executor == "ggml" else replace(seconds, layer_weight_bytes=0.0)),
    )


def _first_of(config: dict[str, Any], keys: tuple[str, ...]) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), 1)


def link_bytes_per_second(config: StageConfig) -> float:
    """Bytes per second from the coordinator's machine; 0 if it is this machine or does not answer yet."""
    coordinator = Target("coordinator", config.coordinator_url)
    reached = try_service(coordinator, config.cluster_token, measures=threading.Lock())
    return 0.0 if reached.machine == config.machine else reached.bytes_per_second or 0.0
