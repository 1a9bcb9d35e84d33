"""noodle's own C functions as operations of ggml's graphs (GGML_OP_CUSTOM); knows none of them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

from services.stage.ggml_calls import GgmlCalls

log = logging.getLogger(__name__)

EVERY_THREAD = -1  # ggml's GGML_N_TASKS_MAX


class CustomOperations:
    """Operations by the functions of one library, on the CPU alone."""

    def __init__(self, ggml: GgmlCalls, library: ctypes.CDLL) -> None:
        self.ggml, self.library = ggml, library
        self._functions: dict[str, Any] = {}
        fields = ggml.ggml_tensor
        offsets = (fields.data.offset, fields.ne.offset, fields.nb.offset, fields.src.offset)
        library.noodle_set_tensor_fields(*(ctypes.c_size_t(offset) for offset in offsets))

    def add(
        self, context: Any, name: str, kind: int, sizes: Sequence[int], sources: Sequence[int], parameters: int = 0
    ) -> int:
        """A tensor that `noodle_{name}` computes of others; `parameters` is the address of what else it is given."""
        tensors = (ctypes.c_void_p * len(sources))(*sources)
        whole = (*sizes, 1, 1, 1)[:4]
        made = self.ggml.ggml_custom_4d(
            context,
            kind,
            *whole,
            ctypes.addressof(tensors),
            len(sources),
            self._function(name),
            EVERY_THREAD,
            parameters or None,
        )
        return int(made)

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            address = ctypes.cast(getattr(self.library, f"noodle_{name}"), ctypes.c_void_p).value
            self._functions[name] = self.ggml.ggml_custom_op_t(address)
        return self._functions[name]


def processor_has(library: ctypes.CDLL, what: str) -> bool:
    """Whether this processor has what some functions of the library use; no where the library knows none of them."""
    asked = getattr(library, f"noodle_has_{what}", None)
    if asked is None:
        log.warning("noodle's kernels are older than this noodle, ggml's compute instead; `make setup` builds them")
        return False
    asked.restype = ctypes.c_bool
    return bool(asked())
