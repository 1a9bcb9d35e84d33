"""How noodle is installed here, and how torch and transformers, which are an extra, are added to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from noodle.errors import TransformersUnavailable

CHECKOUT = Path(__file__).parents[2]  # if noodle runs from its repository
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))  # Docker's and Podman's


def has_transformers() -> bool:
    """Whether torch and transformers are installed; imports neither."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def require_transformers(what: str, *, otherwise: str = "") -> None:
    """Raise TransformersUnavailable if `what` would find no torch or transformers.

    `otherwise` is a sentence that names another cure.
    """
    if not has_transformers():
        raise TransformersUnavailable(
            f"{what} needs torch and transformers, which are not installed here.",
            cure=f"{transformers_cure()} {otherwise}".strip(),
        )


def transformers_cure() -> str:
    """The command that installs the extra in this kind of installation, as a sentence."""
    if (CHECKOUT / "Makefile").is_file():
        return "Run `make transformers` in noodle's folder on this machine (a download of several GB)."
    if any(mark.exists() for mark in CONTAINER_MARKS):
        return "Add STAGE_TARGET=stage-transformers to .env and run `docker compose up -d --build`."
    return "Run `pip install 'noodle[transformers]'`."
