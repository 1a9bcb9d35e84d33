"""Measures layers, embedding and head of one model on this machine, with the slices that a stage would load.

A process for `noodle profile` (`python -m services.stage.tools.profile`): it reads a ProfileQuestion from standard
input and writes ProfileLines to standard output, the last one with the profile (noodle/cluster/measuring.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from noodle.cluster.measuring import MachineProfile, ProcessError, ProfileLine, ProfileProgress, ProfileQuestion
from noodle.errors import ConfigurationError, NoodleError
from noodle.model.files import model_digest
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

    Raises ConfigurationError without torch, or for a device or dtype that this machine does not support.
    """
    progress(0.0, "starting torch")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "Measuring needs torch and transformers, which are not installed here.",
            cure="Run `noodle profile` where a stage is installed (`make setup`, or noodle's extra `stage`).",
        ) from error
    from services.stage.executors.transformers.runtime import read_model_config
    from services.stage.selection.benchmark import one_at_a_time
    from services.stage.tools.profile_device import FULL, QUICK, DeviceProfiler, thread_counts

    folder, cache_dir = Path(question.folder), Path(question.cache_dir)
    config = read_model_config(folder)
    cores = len(os.sched_getaffinity(0))
    notes: list[str] = []
    start_seconds = time.monotonic()
    with one_at_a_time(cache_dir, progress):
        devices = devices_of(question.device, notes)
        extent = QUICK if question.is_quick else FULL
        profiles = []
        for index, device in enumerate(devices):
            profiler = DeviceProfiler(
                folder=folder,
                device=device,
                dtype=question.dtype,
                extent=extent,
                step_tokens=question.step_tokens,
                layer_count=int(config.num_hidden_layers),
                context_length=int(config.max_position_embeddings),
                budget_seconds=extent.measuring_seconds / len(devices),
                progress=partial(_report_device, progress, index, len(devices)),
                notes=notes,
            )
            most = question.threads or cores
            profiles.append(profiler.measure(thread_counts(most) if device == "cpu" else (most,)))
    return MachineProfile(
        model_digest=model_digest(folder),
        model_type=str(config.model_type),
        layer_count=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings),
        torch_version=str(torch.__version__),
        transformers_version=str(transformers.__version__),
        cores=cores,
        seconds=time.monotonic() - start_seconds,
        devices=tuple(profiles),
        notes=tuple(notes),
    )


def _report_device(progress: MeasureProgress, index: int, count: int, done: float, text: str) -> None:
    progress((index + done) / count, text)


def devices_of(wanted: str, notes: list[str]) -> list[str]:
    """The devices to measure, a card that this torch can use first; what is left out is noted."""
    from services.stage.selection.device import TORCH_DEVICES, choose_device

    if wanted not in ("auto", *TORCH_DEVICES):
        notes.append(
            f"NOODLE_DEVICE={wanted} is not measured: ggml alone computes there, and this measures transformers."
        )
        return ["cpu"]
    if wanted != "auto":
        return [choose_device(wanted, ggml_only=False, has_torch=True).value]
    try:
        chosen = choose_device("auto", ggml_only=False, has_torch=True).value
    except ConfigurationError as error:
        notes.append(f"The card is not measured: {error}")
        return ["cpu"]
    return ["cuda", "cpu"] if chosen == "cuda" else ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
