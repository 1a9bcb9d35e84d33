"""Measures this machine for one model with the slices a stage would load: layers, embedding and head, each apart.

A process for `noodle profile` (`python -m services.stage.profile`): a ProfileQuestion on standard input, ProfileLines
on standard output, the last with the profile (noodle/measuring.py). Knows no cluster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from noodle.cluster.measuring import MachineProfile, ProcessError, ProfileLine, ProfileProgress, ProfileQuestion
from noodle.errors import ConfigurationError, NoodleError
from noodle.folders import writing
from noodle.model.files import model_digest
from services.stage.tools.profile_points import FULL, QUICK, thread_counts

Say = Callable[[float, str], None]


def main() -> int:
    """Measure; exit status 1 after an error, which is the last line then."""
    try:
        question = msgspec.json.decode(sys.stdin.buffer.readline(), type=ProfileQuestion)
        profile = profile_machine(question, lambda done, text: _say(ProfileLine(progress=ProfileProgress(done, text))))
    except NoodleError as error:
        _say(ProfileLine(error=ProcessError(error.message, error.cure)))
        return 1
    _say(ProfileLine(profile=profile))
    return 0


def profile_machine(question: ProfileQuestion, say: Say) -> MachineProfile:
    """Every device that is asked for, while no stage measures here; `say` is told how far it is.

    Raises ConfigurationError without torch, or for a device or number format that this machine has not.
    """
    say(0.0, "starting torch")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "Measuring needs torch and transformers, which are not installed here.",
            cure="Run `noodle profile` where a stage is installed (`make setup`, or noodle's extra `stage`).",
        ) from error
    from services.stage.executors.transformers.loading import read_config
    from services.stage.selection.benchmark import one_at_a_time
    from services.stage.tools.profile_device import DeviceProfiler

    folder, cache_dir = Path(question.folder), Path(question.cache_dir)
    read_config(folder)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    cores = len(os.sched_getaffinity(0))
    notes: list[str] = []
    start_seconds = time.monotonic()
    with writing(cache_dir, "NOODLE_CACHE_DIR"):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache_dir, say):
        devices = devices_of(question.device, torch, notes)
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
                say=lambda done, text, index=index: say((index + done) / len(devices), text),  # type: ignore[misc]
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


def devices_of(wanted: str, torch: object, notes: list[str]) -> list[str]:
    """The card first where there is one that this torch can use; what is left out is noted."""
    from services.stage.selection.device import TORCH_DEVICES, choose_device

    if wanted not in ("auto", *TORCH_DEVICES):
        notes.append(
            f"NOODLE_DEVICE={wanted} is not measured: this measures transformers, and ggml alone computes there."
        )
        return ["cpu"]
    if wanted != "auto":
        return [choose_device(wanted, torch).value]
    try:
        chosen = choose_device("auto", torch).value
    except ConfigurationError as error:
        notes.append(f"The card is not measured: {error}")
        return ["cpu"]
    return ["cuda", "cpu"] if chosen == "cuda" else ["cpu"]


def _say(line: ProfileLine) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
