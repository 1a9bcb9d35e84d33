"""How a stage computes a model on this machine: which executor, in which formats, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.stage.executors.candidate import Candidate
from services.stage.executors.load import check_kv_format, ggml_hindrance, only_ggml_computes
from services.stage.selection.device import TORCH_DEVICES, choose_dtype, is_for_ggml
from services.stage.selection.select import ExecutorOptions, candidate_of, choose_executor


def leaves_out_transformers(model: Path, config: dict[str, Any], options: ExecutorOptions, *, has_torch: bool) -> bool:
    """Whether transformers is not to compute this model: a setting, the file or the installation says so."""
    only_ggml = only_ggml_computes(model, config)
    is_file_for_ggml = not options.asks_for_transformers and is_for_ggml(model, only_ggml)
    return options.asks_for_ggml or not has_torch or bool(only_ggml) or is_file_for_ggml


def way_on(
    device: str, model: Path, config: dict[str, Any], options: ExecutorOptions, *, ggml_only: bool
) -> tuple[Candidate, str]:
    """What computes on a device, with the reason. `ggml_only` is what `leaves_out_transformers` says.

    Raises ConfigurationError if nothing that is installed here computes the model as requested.
    """
    hindrance = ""
    if not options.asks_for_transformers:
        hindrance = ggml_hindrance(config, device, is_asked_for=ggml_only)
    only_ggml = only_ggml_computes(model, config)
    if not only_ggml and device not in TORCH_DEVICES:
        only_ggml = f"NOODLE_DEVICE={device}"
    executor, reason = choose_executor(options, hindrance, only_ggml=only_ggml)
    dtype = choose_dtype(options.dtype, device).value if executor == "transformers" else "float32"
    candidate = candidate_of(executor, options, dtype)
    check_kv_format(config, candidate)
    return candidate, reason
