"""Measures this machine for a model and describes it in a MachineReport, in the lifecycle's thread.

torch and transformers take seconds to import and are imported when they are first needed: /health answers before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from noodle import __version__
from noodle.cluster.plan import MachineReport
from noodle.config.settings import StageConfig
from noodle.model.files import model_digest, read_config
from noodle.model.formats import Quality
from noodle.web.connectivity import Target, try_service
from services.stage.executors.base import Fetch, nothing_to_fetch
from services.stage.executors.candidate import Candidate
from services.stage.executors.ggml.backend import keep_float32_on_cards
from services.stage.executors.load import build_of, ggml_hindrance, version_of
from services.stage.selection.benchmark import MeasuredSeconds, MeasurementKey, MeasureProgress, measure_machine
from services.stage.selection.device import TORCH_DEVICES, choose_device, choose_dtype, device_name, free_memory
from services.stage.selection.quality import ModelQuality
from services.stage.selection.select import ExecutorOptions, candidates, choose, choose_threads

log = logging.getLogger(__name__)


def import_early() -> None:
    """Import torch and transformers in a thread of its own while this stage waits for others.

    A later import waits for this one. An import error is left to the code that needs the package.
    """

    def run() -> None:
        with contextlib.suppress(ImportError):
            import services.stage.executors.transformers.loading  # noqa: F401

    threading.Thread(target=run, name="import", daemon=True).start()


def build_machine_report(
    config: StageConfig,
    boot_id: str,
    folder: Path,
    *,
    progress: MeasureProgress,
    fetch: Fetch = nothing_to_fetch,
    known_quality: Callable[[MachineReport], Quality | None] = lambda _: None,
) -> MachineReport:
    """Measure what this machine can do for the model in `folder`, or read an earlier measurement.

    `known_quality` may return what other stages measured for a report's weights; otherwise the whole model is fetched.
    """
    progress(0.0, "starting torch")
    # the module that import_early imports comes first: two threads in one package in different order get it half-made
    import services.stage.executors.transformers.loading  # noqa: F401
    from services.stage.executors.transformers.runtime import read_model_config, set_threads

    threads = config.threads or len(os.sched_getaffinity(0))
    set_threads(threads)
    if config.quality == "exact":
        keep_float32_on_cards()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device.value)
    memory = free_memory(device.value)
    log.info("computing on %s (%s) in %s (%s)", device.value, device.reason, dtype.value, dtype.reason)
    log.info("%d threads, %d bytes free (%s)", threads, memory.free_bytes, memory.source)
    model = read_model_config(folder)
    layer_count, context_length = int(model.num_hidden_layers), int(model.max_position_embeddings)
    name, digest = device_name(device.value), model_digest(folder)
    options = ExecutorOptions(config.executor, config.weights, config.quality, config.dtype)
    hindrance = ""
    if config.executor != "transformers":
        hindrance = ggml_hindrance(read_config(folder), device.value, is_asked_for=options.asks_for_ggml)
    if hindrance:
        log.info("transformers alone computes here: %s", hindrance)
    report = MachineReport(
        stage_id=config.stage_id,
        machine=config.machine,
        url=config.advertise_url,
        boot_id=boot_id,
        noodle_version=__version__,
        model_digest=digest,
        device=device.value,
        device_name=name,
        dtype=dtype.value,
        threads=threads,
        free_bytes=memory.free_bytes,
        decode_layer_seconds=0.0,
        prefill_layer_seconds_per_token=0.0,
        head_decode_seconds=0.0,
    )
    qualities = ModelQuality(
        folder=folder,
        digest=digest,
        layer_count=layer_count,
        context_length=context_length,
        device=device.value,
        threads=threads,
        cache_dir=config.cache_dir,
        progress=progress,
        fetch=fetch,
    )

    def measure(candidate: Candidate, threads: int = threads) -> MeasuredSeconds:
        set_threads(threads)
        key = MeasurementKey(
            model_digest=digest,
            device=device.value,
            device_name=name,
            candidate=candidate,
            executor_version=build_of(candidate.executor),
            threads=threads,
            noodle_version=__version__,
        )
        return measure_machine(
            folder,
            layer_count,
            context_length,
            key=key,
            cache_dir=config.cache_dir,
            progress=lambda done, text: progress(done, f"{candidate}: {text}"),
        )

    def quality_of(candidate: Candidate, seconds: MeasuredSeconds) -> Quality:
        known = known_quality(with_candidate(report, candidate))
        return known or qualities.of(candidate, layer_count * seconds.prefill_layer_seconds_per_token)

    has_gguf = [path.is_file() for path in folder.glob("*.gguf")] == [True]
    only_ggml = "" if device.value in TORCH_DEVICES else f"NOODLE_DEVICE={device.value}"
    compared = candidates(options, dtype.value, hindrance, has_gguf=has_gguf, only_ggml=only_ggml)
    chosen = choose(compared, config.quality, measure, quality_of)
    if device.value == "cpu":
        threads, chosen = choose_threads(chosen, threads, measure)
        set_threads(threads)
    log.info("layers are computed on %d threads by %s", threads, chosen.reason)
    is_ggml = chosen.candidate.executor == "ggml"
    seconds = chosen.seconds if is_ggml else replace(chosen.seconds, layer_weight_bytes=0.0)
    return msgspec.structs.replace(
        with_candidate(report, chosen.candidate),
        threads=threads,
        **asdict(seconds),
        executor_version=version_of(chosen.candidate.executor),
        quality=chosen.quality,
        link_bytes_per_second=link_bytes_per_second(config),
        choice=chosen.reason if not hindrance else f"{chosen.reason}; no ggml: {hindrance}",
    )


def link_bytes_per_second(config: StageConfig) -> float:
    """Bytes per second from the coordinator's machine; 0 if it is this machine or does not answer yet."""
    coordinator = Target("coordinator", config.coordinator_url)
    reached = try_service(coordinator, config.cluster_token, measures=threading.Lock())
    return 0.0 if reached.machine == config.machine else reached.bytes_per_second or 0.0


def with_candidate(report: MachineReport, candidate: Candidate) -> MachineReport:
    return msgspec.structs.replace(report, **asdict(candidate))
