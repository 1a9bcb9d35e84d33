"""Weights in Q8_0 as noodle's own kernels take them, and products by them in a graph of ggml; knows no layer.

The kernels are in `kernels/packed_rows.c`, which says how they are faster than ggml's. They are built beside ggml's
libraries where a compiler was; without them, or on a processor that lacks what they use, ggml's own compute.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from services.stage.ggml_calls import GgmlCalls
from services.stage.ggml_library import folder_of_libraries
from services.stage.ggml_weights import TYPE_NUMBERS, Block

log = logging.getLogger(__name__)

LIBRARY_NAME = "libnoodle-rows.so"
GROUP_ROWS = 16  # of a weight stand side by side
BLOCK_ITEMS = 32
TILE_BLOCK_BYTES = 40  # of a block of activations: its numbers, its scale and what corrects for unsigned weights
PACKED_TYPE = TYPE_NUMBERS["q8_0"]
EVERY_THREAD = -1  # ggml's GGML_N_TASKS_MAX


class PackedRows:
    """The kernels, as operations of ggml's graphs."""

    def __init__(self, ggml: GgmlCalls, library: ctypes.CDLL) -> None:
        self._ggml, self._library = ggml, library
        fields = ggml.ggml_tensor
        offsets = (fields.data.offset, fields.ne.offset, fields.nb.offset, fields.src.offset)
        library.noodle_set_tensor_fields(*(ctypes.c_size_t(offset) for offset in offsets))

    def pack(self, blocks: Mapping[str, Block], *, also_embedding: bool) -> frozenset[tuple[str, str]]:
        """Lay out in place what can be: matrices of one type; gives them by block and name.

        Embeddings, which rows are taken from, only where asked for: then by `take_rows`.
        """
        packed = set()
        for block_name, block in blocks.items():
            if block_name == "embedding" and not also_embedding:
                continue
            for placed in block.tensors:
                length, *others = placed.sizes
                is_matrix = placed.type_number == PACKED_TYPE and len(others) == 1
                if not is_matrix or length % BLOCK_ITEMS or others[0] % GROUP_ROWS or block_name == "positions":
                    continue
                memory = block.memory[placed.offset : placed.offset + placed.byte_count]
                spare = np.empty(GROUP_ROWS * placed.byte_count // others[0], np.uint8)
                self._library.noodle_pack(
                    ctypes.c_void_p(memory.ctypes.data),
                    ctypes.c_void_p(spare.ctypes.data),
                    ctypes.c_int64(others[0]),
                    ctypes.c_int64(length),
                )
                packed.add((block_name, placed.name))
        return frozenset(packed)

    def quantised(self, context: Any, rows: int) -> int:
        """Rows [features, count] in float32 as tiles in 8 bits, for any number of products."""
        features, count = self._ggml.ggml_tensor.from_address(rows).ne[:2]
        bytes_of_row = features // BLOCK_ITEMS * TILE_BLOCK_BYTES
        return self._operation(context, "quantise", self._ggml.GGML_TYPE_I8, bytes_of_row, count, rows)

    def product(self, context: Any, weight: int, tiles: int) -> int:
        """Like ggml's mul_mat of a weight that was packed and the rows that the tiles were made of."""
        count = self._ggml.ggml_tensor.from_address(tiles).ne[1]
        outputs = self._ggml.ggml_tensor.from_address(weight).ne[1]
        return self._operation(context, "multiply", self._ggml.GGML_TYPE_F32, outputs, count, weight, tiles)

    def take_rows(self, context: Any, weight: int, ids: int) -> int:
        """Like ggml's get_rows."""
        features = self._ggml.ggml_tensor.from_address(weight).ne[0]
        count = self._ggml.ggml_tensor.from_address(ids).ne[0]
        return self._operation(context, "take_rows", self._ggml.GGML_TYPE_F32, features, count, weight, ids)

    def _operation(self, context: Any, name: str, kind: int, columns: int, rows: int, *sources: int) -> int:
        tensors = (ctypes.c_void_p * len(sources))(*sources)
        address = ctypes.addressof(tensors)
        made = self._ggml.ggml_custom_4d(
            context, kind, columns, rows, 1, 1, address, len(sources), self._function(name), EVERY_THREAD, None
        )
        return int(made)

    @functools.cache  # noqa: B019  # three functions, of kernels that live as long as the process
    def _function(self, name: str) -> Any:
        address = ctypes.cast(getattr(self._library, f"noodle_{name}"), ctypes.c_void_p).value
        return self._ggml.ggml_custom_op_t(address)


def packed_rows(ggml: GgmlCalls) -> PackedRows | None:
    """The kernels where they were built and this processor runs them, else None."""
    path = folder_of_libraries() / LIBRARY_NAME
    library = _library(path) if path.is_file() else None
    return PackedRows(ggml, library) if library is not None else None


@functools.cache
def _library(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("%s can not be loaded, ggml's own kernels compute: %s", path, error)
        return None
    library.noodle_has_packed_rows.restype = ctypes.c_bool
    if not library.noodle_has_packed_rows():
        log.info("this processor has no AVX512-VNNI: ggml's own kernels multiply by weights in 8 bits")
        return None
    return library
