"""Measures layers, embedding and head of one model on this machine, with the slices that a stage would load.

A process for `noodle profile` (`python -m services.stage.tools.profile`): it reads a ProfileQuestion from standard
input and writes ProfileLines to standard output, the last one with the profile (noodle/cluster/measuring.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from noodle.cluster.measuring import MachineProfile, ProcessError, ProfileLine, ProfileProgress, ProfileQuestion
from noodle.config.cores import usable_cores
from noodle.errors import ConfigurationError, NoodleError
from noodle.installation import has_transformers
from noodle.model.files import model_digest, read_config
from services.stage.executors.load import version_of
from services.stage.selection.benchmark import one_at_a_time
from services.stage.selection.device import choose_device
from services.stage.selection.report import CONTEXT_KEYS, LAYER_COUNT_KEYS, first_of
from services.stage.selection.select import ExecutorOptions
from services.stage.selection.way import leaves_out_transformers, way_on
from services.stage.tools.profile_device import FULL, QUICK, DeviceProfiler, thread_counts
from services.stage.tools.reference import write_line

MeasureProgress = Callable[[float, str], None]


def main() -> int:
    """Measure; after an error the last line describes it and the exit status is 1."""
    try:
        question = msgspec.json.decode(sys.stdin.buffer.readline(), type=ProfileQuestion)
        profile = profile_machine(
            question, lambda done, text: write_line(ProfileLine(progress=ProfileProgress(done, text)))
        )
    except NoodleError as error:
        write_line(ProfileLine(error=ProcessError(error.message, error.cure)))
        return 1
    write_line(ProfileLine(profile=profile))
    return 0


def profile_machine(question: ProfileQuestion, progress: MeasureProgress) -> MachineProfile:
    """Measure every requested device while no stage measures; `progress` receives the share done and a description.

    Layers are computed as a stage computes them by default. Raises NoodleError for a device or dtype that this machine
    does not support, or if nothing that is installed here computes the model.
    """
    progress(0.0, "choosing what computes")
    folder, cache_dir = Path(question.folder), Path(question.cache_dir)
    config = read_config(folder)
    layer_count, context_length = (first_of(config, keys) for keys in (LAYER_COUNT_KEYS, CONTEXT_KEYS))
    cores = usable_cores()
    notes: list[str] = []
    start_seconds = time.monotonic()
    with one_at_a_time(cache_dir, progress):
        options = ExecutorOptions(dtype=question.dtype)  # a named dtype is transformers'
        ggml_only = leaves_out_transformers(folder, config, options, has_torch=has_transformers())
        devices = devices_of(question.device, notes, ggml_only=ggml_only)
        extent = QUICK if question.is_quick else FULL
        profiles = []
        for index, device in enumerate(devices):
            candidate, reason = way_on(device, folder, config, options, ggml_only=ggml_only)
            profiler = DeviceProfiler(
                folder=folder,
                device=device,
                candidate=candidate,
                reason=reason,
                extent=extent,
                step_tokens=question.step_tokens,
                layer_count=layer_count,
                context_length=context_length,
                budget_seconds=extent.measuring_seconds / len(devices),
                progress=partial(_report_device, progress, index, len(devices)),
                notes=notes,
            )
            most = question.threads or cores
            profiles.append(profiler.measure(thread_counts(most) if device == "cpu" else (most,)))
    return MachineProfile(
        model_digest=model_digest(folder),
        model_type=str(config.get("model_type") or ""),
        layer_count=layer_count,
        hidden_size=first_of(config, ("hidden_size", "n_embd")),
        vocab_size=first_of(config, ("vocab_size",)),
        context_length=context_length,
        executor_version=" and ".join(sorted({version_of(profile.dtype.split()[0]) for profile in profiles})),
        cores=cores,
        seconds=time.monotonic() - start_seconds,
        devices=tuple(profiles),
        notes=tuple(notes),
    )


def _report_device(progress: MeasureProgress, index: int, count: int, done: float, text: str) -> None:
    progress((index + done) / count, text)


def devices_of(wanted: str, notes: list[str], *, ggml_only: bool = False) -> list[str]:
    """The devices to measure, a card that can compute here first; what is left out is noted."""
    if wanted != "auto":
        return [choose_device(wanted, ggml_only=ggml_only, has_torch=not ggml_only).value]
    try:
        chosen = choose_device("auto", ggml_only=ggml_only, has_torch=not ggml_only).value
    except ConfigurationError as error:
        notes.append(f"The card is not measured: {error}")
        return ["cpu"]
    return ["cuda", "cpu"] if chosen == "cuda" else ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
