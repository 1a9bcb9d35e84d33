"""noodle's own C functions as operations of ggml's graphs (GGML_OP_CUSTOM); knows none of them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from services.stage.executors.ggml.calls import GgmlCalls
from services.stage.executors.ggml.kernels import own_library

log = logging.getLogger(__name__)

EVERY_THREAD = -1  # ggml's GGML_N_TASKS_MAX
# with which instructions floats are computed, and the library's question for them; later ones are faster
FLOATS = {"avx2": "avx2", "avx512": "avx512_floats"}


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

    def fastest(self, instructions: Mapping[str, str], only: str | None = None) -> str:
        """The last of these, by the library's question for each, that this processor has; "" is none."""
        run = [name for name, what in instructions.items() if only in (None, name) and self._has(what)]
        return run[-1] if run else ""

    def _has(self, what: str) -> bool:
        asked = getattr(self.library, f"noodle_has_{what}")
        asked.restype = ctypes.c_bool
        return bool(asked())

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            address = ctypes.cast(getattr(self.library, f"noodle_{name}"), ctypes.c_void_p).value
            self._functions[name] = self.ggml.ggml_custom_op_t(address)
        return self._functions[name]


def own_operations(ggml: GgmlCalls) -> CustomOperations | None:
    """By noodle's own library; None where it was not built, or by an older noodle."""
    library = own_library()
    if library is None:
        return None
    if not hasattr(library, "noodle_has_avx2"):
        log.warning("noodle's kernels are older than this noodle, ggml's compute instead; `make setup` builds them")
        return None
    return CustomOperations(ggml, library)
