"""noodle's own C functions (`kernels/`): one library, built beside ggml's where a compiler was."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from noodle.errors import GgmlUnavailable
from services.stage.executors.ggml.backend import folder_of_libraries

log = logging.getLogger(__name__)

LIBRARY_NAME = "libnoodle.so"


def own_library() -> ctypes.CDLL | None:
    """The library, None where it was not built."""
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
        log.warning("noodle's own library %s can not be loaded, all goes without: %s", path, error)
        return None
