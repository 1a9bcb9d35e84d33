"""noodle's own C kernels as a library, and which instructions of theirs this processor has.

The library is built beside ggml's if a compiler is installed. Without it, or on a processor that lacks the
instructions, ggml's own kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from noodle.errors import GgmlUnavailable
from services.stage.executors.ggml.backend import folder_of_libraries
from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls

log = logging.getLogger(__name__)

LIBRARY_NAME = "libnoodle.so"
NEWEST_FUNCTION = "noodle_has_neon"  # that an older noodle's library lacks
INSTRUCTIONS = ("avx2", "avx512", "neon")  # of which a processor may have some; later ones are faster


def own_library() -> ctypes.CDLL | None:
    """noodle's library; None if it was not built or cannot be loaded."""
    try:
        path = folder_of_libraries() / LIBRARY_NAME
    except GgmlUnavailable:
        return None
    return _loaded(path) if path.is_file() else None


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("noodle's kernels %s cannot be loaded, ggml's kernels compute instead: %s", path, error)
        return None


def own_operations(ggml: GgmlCalls) -> CustomOperations | None:
    """Operations by noodle's library; None if it was not built, or by an older noodle."""
    library = own_library()
    if library is None:
        return None
    if not hasattr(library, NEWEST_FUNCTION):
        _warn_once("noodle's kernels are older than this noodle, ggml's compute instead; `make setup` builds them")
        return None
    return CustomOperations(ggml, library)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def fastest(operations: CustomOperations, only: str | None) -> str:
    """The fastest instructions that this processor has (`only` these, if it has them); empty if it has none."""
    names = [name for name in INSTRUCTIONS if only in (None, name) and operations.supports(name)]
    return names[-1] if names else ""
