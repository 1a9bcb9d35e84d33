"""Describes this machine and how it computes a model in a MachineReport, in the lifecycle's thread.

Neither torch nor transformers is imported unless transformers computes.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noodle import __version__
from noodle.cluster.plan import FormatSeconds, MachineReport
from noodle.config.cores import usable_cores
from noodle.config.settings import StageConfig
from noodle.installation import has_transformers
from noodle.model.configs.completed import completed_config
from noodle.model.files import model_digest, read_config, read_tensor_entries
from noodle.model.formats import STORED
from noodle.model.quantization import held_tensors
from noodle.web.connectivity import Target, try_service
from services.stage.executors.ggml.backend import flags_digest, keep_float32_on_cards
from services.stage.executors.load import build_of, ggml_device, version_of
from services.stage.selection.benchmark import MeasurementKey, MeasureProgress, measure_machine
from services.stage.selection.device import choose_device, device_name, free_memory
from services.stage.selection.layer_costs import LayerSeconds, layer_seconds, model_weights
from services.stage.selection.machine_speed import machine_speed
from services.stage.selection.select import ExecutorOptions
from services.stage.selection.way import leaves_out_transformers, way_on

log = logging.getLogger(__name__)

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
COMPARED_FORMATS = ("q8_0", "q4_K", "q4_0")  # that a person may convert to for speed, the most precise first
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def build_machine_report(config: StageConfig, boot_id: str, model: Path, *, progress: MeasureProgress) -> MachineReport:
    """Choose how this machine computes `model`, and measure it or read an earlier measurement.

    Raises ConfigurationError if nothing that is installed here computes the model as requested.
    """
    progress(0.0, "choosing what computes the layers here")
    threads = config.threads or usable_cores()
    options = ExecutorOptions(config.executor, config.weights, config.quality, config.dtype, config.kv_format)
    if options.is_exact:
        keep_float32_on_cards()
    has_torch = has_transformers()
    read = read_config(model)
    ggml_only = leaves_out_transformers(model, read, options, has_torch=has_torch)
    device = choose_device(config.device, ggml_only=ggml_only, has_torch=has_torch)
    candidate, why = way_on(device.value, model, read, options, ggml_only=ggml_only)
    executor = candidate.executor
    log.info("computing on %s (%s) by %s (%s), %d threads", device.value, device.reason, candidate, why, threads)
    if executor == "transformers":
        from services.stage.executors.transformers.runtime import set_threads

        set_threads(threads)
    memory = free_memory(device.value, executor)
    log.info("%d bytes free (%s)", memory.free_bytes, memory.source)
    name, digest = device_name(device.value, executor), model_digest(model)
    if executor == "ggml":
        seconds, threads, other_formats = _by_ggml(
            config,
            model,
            read,
            candidate.weights,
            device=device.value,
            device_name=name,
            threads=threads,
            progress=progress,
        )
    else:
        other_formats = {}
        key = MeasurementKey(
            model_digest=digest,
            device=device.value,
            device_name=name,
            candidate=candidate,
            executor_version=build_of(executor),
            threads=threads,
            noodle_version=__version__,
        )
        counts = (first_of(read, LAYER_COUNT_KEYS), first_of(read, CONTEXT_KEYS))
        seconds = measure_machine(model, *counts, key=key, cache_dir=config.cache_dir, progress=progress)
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
        **asdict(seconds),
        other_formats=other_formats,
    )


def _by_ggml(
    config: StageConfig,
    model: Path,
    read: dict[str, Any],
    weights: str,
    *,
    device: str,
    device_name: str,
    threads: int,
    progress: MeasureProgress,
) -> tuple[LayerSeconds, int, dict[str, FormatSeconds]]:
    """Seconds of a layer in a format of weights, from the model's header; threads; and seconds in other formats."""
    completed = completed_config(read)  # each family has its own names and defaults of the same numbers
    tensors = held_tensors(read, read_tensor_entries(model))
    matrices = model_weights(completed, tensors, completed["num_hidden_layers"])
    compared = COMPARED_FORMATS if config.quality == STORED else ()
    others = [name for name in compared if name != weights and matrices.fits(name)]
    by_format = {name: matrices.in_format(name) for name in (weights, *others)}
    key = ("speed", device, device_name, flags_digest(), build_of("ggml"), threads, __version__)
    speed = machine_speed(
        list(dict.fromkeys(each for one in by_format.values() for each in one.types)),
        key=" | ".join(map(str, key)),
        device_name=ggml_device(device),
        threads=threads,
        cache_dir=config.cache_dir,
        progress=progress,
    )
    seconds = {name: layer_seconds(each, speed) for name, each in by_format.items()}
    other_formats = {
        name: FormatSeconds(
            seconds[name].decode_layer_seconds,
            seconds[name].prefill_layer_seconds_per_token,
            seconds[name].head_decode_seconds,
            seconds[name].layer_weight_bytes,
        )
        for name in others
    }
    return seconds[weights], speed.threads, other_formats


def first_of(config: dict[str, Any], keys: tuple[str, ...]) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), 1)


def link_bytes_per_second(config: StageConfig) -> float:
    """Bytes per second from the coordinator's machine; 0 if it is this machine or does not answer yet."""
    coordinator = Target("coordinator", config.coordinator_url)
    reached = try_service(coordinator, config.cluster_token, measures=threading.Lock())
    return 0.0 if reached.machine == config.machine else reached.bytes_per_second or 0.0
