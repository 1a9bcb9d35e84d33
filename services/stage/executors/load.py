"""Loads a slice by the executor that a candidate names; the only module that knows both executors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noodle.errors import ConfigurationError, GgmlUnavailable
from noodle.installation import require_transformers
from services.stage.executors.base import Fetch, ModelSlice, ReadProgress, ignore_progress, nothing_to_fetch
from services.stage.executors.candidate import Candidate
from services.stage.executors.ggml.backend import ggml_build, ggml_version, load_ggml
from services.stage.executors.ggml.families import ggml_lacks
from services.stage.executors.ggml.shape import kv_problem
from services.stage.executors.transformers.gguf_families import only_ggml_computes

__all__ = [
    "build_of",
    "check_kv_format",
    "ggml_device",
    "ggml_hindrance",
    "load_by",
    "only_ggml_computes",
    "version_of",
]


def load_by(
    candidate: Candidate,
    folder: Path,
    start_layer: int,
    end_layer: int,
    *,
    device: str,
    threads: int,
    context_length: int,
    cache_dir: Path | None,
    progress: ReadProgress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
) -> ModelSlice:
    """Load layers [start_layer, end_layer) of the model in `folder` as the candidate computes them."""
    # importing torch and transformers takes seconds
    if candidate.executor == "ggml":
        from services.stage.executors.ggml.loading import load_ggml_slice

        return load_ggml_slice(
            folder,
            start_layer,
            end_layer,
            weights=candidate.weights,
            kv_dtype=candidate.kv_dtype,
            context_length=context_length,
            threads=threads,
            device_name=ggml_device(device),
            progress=progress,
            fetch=fetch,
            cache_dir=cache_dir,
        )
    require_transformers("Computing by transformers")
    from services.stage.executors.transformers.loading import load_slice

    return load_slice(
        folder,
        start_layer,
        end_layer,
        device=device,
        dtype=candidate.dtype,
        context_length=context_length,
        progress=progress,
        fetch=fetch,
    )


def ggml_device(device: str) -> str:
    """ggml's name of a stage's device, as CUDA0 for cuda; raises GgmlUnavailable if this build does not have it."""
    devices = load_ggml().devices
    found = next((name for name in devices if name.rstrip("0123456789").lower() == device), None)
    if found is None:
        raise GgmlUnavailable(
            f"this ggml computes on {', '.join(devices)} and not on {device}.",
            cure=f"Build it for that (make ggml GGML_CMAKE_ARGS=-DGGML_{device.upper()}=ON, with its driver and tools "
            "installed), or leave NOODLE_EXECUTOR at auto.",
        )
    return found


def ggml_hindrance(config: dict[str, Any], device: str, *, is_asked_for: bool = True) -> str:
    """Reason why ggml cannot compute this model here, with the cure; empty if it can.

    On a CUDA card ggml is compared only if it `is_asked_for`: its kernels are untested there, and some of ggml's errors
    end the process.
    """
    if device == "cuda" and not is_asked_for:
        return "on a CUDA card ggml computes only if asked for (NOODLE_EXECUTOR=ggml)."
    if lacks := ggml_lacks(config):
        return f"{lacks.rstrip('.')}."
    try:
        ggml_device(device)
    except GgmlUnavailable as error:
        return str(error)
    return ""


def check_kv_format(config: dict[str, Any], candidate: Candidate) -> None:
    """Raise ConfigurationError if the candidate's format of KV rows does not suit this model's heads."""
    problem = kv_problem(config, candidate.kv_dtype) if candidate.executor == "ggml" else ""
    if problem:
        raise ConfigurationError(
            f"NOODLE_KV is {candidate.kv_dtype}: {problem}", cure="Choose f16, or leave it at auto."
        )


def version_of(executor: str) -> str:
    """Name and version of the package that computes, the same on every machine."""
    if executor == "ggml":
        return f"ggml-python {ggml_version()}"
    from services.stage.executors.transformers.runtime import torch_version

    return f"torch {torch_version()}"


def build_of(executor: str) -> str:
    """The version and this machine's build of it, as the key of its measured speed and quality."""
    return f"{version_of(executor)} {ggml_build()}" if executor == "ggml" else version_of(executor)
