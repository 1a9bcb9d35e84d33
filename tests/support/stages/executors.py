"""Both executors behind one call; a missing ggml skips the test, and fails it in CI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from noodle.errors import GgmlUnavailable
from services.stage.executors.base import ModelSlice
from services.stage.executors.ggml.backend import load_ggml
from services.stage.executors.ggml.loading import load_ggml_slice
from services.stage.executors.ggml.slice import GgmlSlice
from services.stage.executors.transformers.loading import load_slice

EXECUTORS = ("transformers", "ggml")


def need_ggml() -> None:
    """Skip the test if ggml cannot be loaded; fail it in CI."""
    try:
        load_ggml()
    except GgmlUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"ggml is needed in CI: {error}")
        pytest.skip(str(error))


def exactly(executor: str) -> dict[str, str]:
    """Return the variables for a cluster that computes in float32 with this executor; skip if it is missing."""
    if executor == "ggml":
        need_ggml()
    return {"NOODLE_EXECUTOR": executor, "NOODLE_QUALITY": "exact"}


def load_exact(executor: str, folder: Path, start: int, end: int, **options: Any) -> ModelSlice:
    """Load a slice with float32 weights and float32 KV rows; ggml on one thread, torch on its default."""
    settings = {"context_length": 256, **options}
    if executor == "transformers":
        return load_slice(folder, start, end, **{"device": "cpu", "dtype": "float32", **settings})
    need_ggml()
    return load_by_ggml(folder, start, end, **{"weights": "f32", "kv_dtype": "f32", "threads": 1, **settings})


def load_by_ggml(folder: Path, start: int, end: int, **options: Any) -> GgmlSlice:
    """Load a slice that ggml computes."""
    return load_ggml_slice(folder, start, end, **options)
