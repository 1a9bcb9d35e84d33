"""Where the stage meets torch: measures its machine, in the lifecycle's thread.

torch and transformers take seconds to import, so they are imported when first needed: /health answers before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from noodle import __version__
from noodle.cluster.plan import MachineReport
from noodle.config.settings import StageConfig
from noodle.metrics.scraped import CardUse
from noodle.model.files import model_digest, read_config
from noodle.model.formats import Quality
from noodle.web.connectivity import Target, try_service
from services.stage.executors.candidate import Candidate, Wishes, asks_for_ggml, candidates
from services.stage.executors.reading import Fetch, nothing_to_fetch

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]


def import_early() -> threading.Thread:
    """Import what computing needs in a thread of its own, for the time in which this stage waits for others.

    Whoever needs it sooner imports it as well, and waits for this; what can not be imported fails there.
    """

    def run() -> None:
        with contextlib.suppress(ImportError):  # said by whoever needs it
            import services.stage.selection.benchmark  # noqa: F401  # with torch and transformers

    thread = threading.Thread(target=run, name="import", daemon=True)
    thread.start()
    return thread


def measured_report(
    config: StageConfig,
    boot_id: str,
    folder: Path,
    progress: Progress,
    fetch: Fetch = nothing_to_fetch,
    known_quality: Callable[[MachineReport], Quality | None] = lambda _: None,
) -> MachineReport:
    """What this machine can do for this model, measured with the real code or read from an earlier measurement.

    `known_quality` is asked what others measured of a report's weights, before the whole model is fetched for that.
    """
    progress(0.0, "starting torch")
    import torch
    from transformers import AutoConfig

    from noodle.model.families import check_supported
    from services.stage.executors.ggml.backend import keep_float32_on_cards
    from services.stage.executors.load import build_of, ggml_hindrance, version_of
    from services.stage.selection.benchmark import MeasuredSeconds, MeasurementKey, measure_machine
    from services.stage.selection.device import TORCH_DEVICES, choose_device, choose_dtype, device_name, free_memory
    from services.stage.selection.model_quality import ModelQuality
    from services.stage.selection.select import choose, choose_threads

    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if config.quality == "exact":
        keep_float32_on_cards()
    device = choose_device(config.device, torch)
    dtype = choose_dtype(config.dtype, device.value, torch)
    memory = free_memory(device.value, torch)
    log.info("computing on %s (%s) in %s (%s)", device.value, device.reason, dtype.value, dtype.reason)
    log.info("%d threads, %d bytes free (%s)", threads, memory.free_bytes, memory.source)
    settings = read_config(folder)
    check_supported(settings)
    model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layer_count, cache_dir = int(model.num_hidden_layers), config.cache_dir
    name = device_name(device.value, torch)
    digest = model_digest(folder)
    context_length = int(model.max_position_embeddings)
    wishes = Wishes(config.executor, config.weights, config.quality, config.dtype)
    hindrance = ""
    if config.executor != "transformers":
        hindrance = ggml_hindrance(settings, device.value, is_asked_for=asks_for_ggml(wishes))
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

    def measure(candidate: Candidate, threads: int = threads) -> MeasuredSeconds:
        torch.set_num_threads(threads)
        key = MeasurementKey(
            digest,
            device.value,
            name,
            candidate.executor,
            build_of(candidate.executor),
            candidate.weights,
            candidate.kv_dtype,
            candidate.dtype,
            threads,
            __version__,
        )
        return measure_machine(
            folder,
            layer_count,
            context_length,
            key,
            cache_dir,
            lambda done, what: progress(done, f"{candidate}: {what}"),
        )

    def quality_of(candidate: Candidate, seconds: MeasuredSeconds) -> Quality:
        known = known_quality(with_candidate(report, candidate))
        return known or qualities.of(candidate, layer_count * seconds.prefill_layer_seconds_per_token)

    qualities = ModelQuality(
        folder,
        digest,
        layer_count,
        context_length,
        device.value,
        threads,
        cache_dir,
        progress,
        fetch,
    )
    has_gguf = [path.is_file() for path in folder.glob("*.gguf")] == [True]
    only_ggml = "" if device.value in TORCH_DEVICES else f"NOODLE_DEVICE={device.value}"
    compared = candidates(wishes, dtype.value, hindrance, has_gguf=has_gguf, only_ggml=only_ggml)
    chosen = choose(compared, config.quality, measure, quality_of)
    if device.value == "cpu":
        threads, chosen = choose_threads(chosen, threads, measure)
        torch.set_num_threads(threads)
    log.info("layers are computed on %d threads by %s", threads, chosen.reason)
    return msgspec.structs.replace(
        with_candidate(report, chosen.candidate),
        threads=threads,
        decode_layer_seconds=chosen.seconds.decode_layer_seconds,
        prefill_layer_seconds_per_token=chosen.seconds.prefill_layer_seconds_per_token,
        head_decode_seconds=chosen.seconds.head_decode_seconds,
        batched_layer_seconds=chosen.seconds.batched_layer_seconds,
        batched_head_seconds=chosen.seconds.batched_head_seconds,
        source=chosen.seconds.source,
        layer_weight_bytes=chosen.seconds.layer_weight_bytes if chosen.candidate.executor == "ggml" else 0.0,
        executor_version=version_of(chosen.candidate.executor),
        quality=chosen.quality,
        link_bytes_per_second=link_bytes_per_second(config),
        choice=chosen.reason if not hindrance else f"{chosen.reason}; no ggml: {hindrance}",
    )


def link_bytes_per_second(config: StageConfig) -> float:
    """How fast bytes come here from the coordinator's machine, 0 when it is this one or does not answer yet."""
    coordinator = Target("coordinator", config.coordinator_url)
    reached = try_service(coordinator, config.cluster_token, measures=threading.Lock())
    return 0.0 if reached.machine == config.machine else reached.bytes_per_second or 0.0


def with_candidate(report: MachineReport, candidate: Candidate) -> MachineReport:
    """The report of a stage that computes so."""
    return msgspec.structs.replace(
        report,
        executor=candidate.executor,
        weights=candidate.weights,
        kv_dtype=candidate.kv_dtype,
        dtype=candidate.dtype,
    )


def card_reader() -> Callable[[], CardUse | None]:
    """How to look at the card that this stage computes on; torch stands already when this is called."""
    import torch

    from services.stage.selection.device import card_use

    return lambda: card_use(torch)
