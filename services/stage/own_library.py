"""noodle's own C functions (`kernels/`): one library, built beside ggml's where a compiler was."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARY_NAME = "libnoodle.so"


def own_library(*, keeps_lock: bool = False) -> ctypes.CDLL | None:
    """The library, None where it was not built; its functions can keep the interpreter's lock, if they are short."""
    found = importlib.util.find_spec("ggml")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "lib" / LIBRARY_NAME
    return _loaded(path, keeps_lock) if path.is_file() else None


@functools.cache
def _loaded(path: Path, keeps_lock: bool) -> ctypes.CDLL | None:
    try:
        return (ctypes.PyDLL if keeps_lock else ctypes.CDLL)(str(path))
    except OSError as error:
        log.warning("noodle's own library %s can not be loaded, all goes without: %s", path, error)
        return None
