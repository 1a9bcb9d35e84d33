"""noodle's matrix products in ggml's graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls
from services.stage.executors.ggml.kernels.library import FLOATS, fastest, own_operations
from services.stage.executors.ggml.weights import TYPE_NUMBERS, TensorLayout, WeightBlock

GROUP_ROWS = 16  # weight rows that are interleaved
BLOCK_ITEMS = 32  # of Q8_0
UNIT_ITEMS = {"f32": 1, "f16": 1, "bf16": 2, "q8_0": BLOCK_ITEMS}  # elements of a row that stay together
UNIT_BYTES = {"f32": 4, "f16": 2, "bf16": 4, "q8_0": 0}  # 0 means blocks
TILES = {"f32": "arrange", "f16": "arrange", "bf16": "arrange_bf16", "q8_0": "quantise"}
TILE_BLOCK_BYTES = {"avx2": 72, "avx512": 40}  # of Q8_0 activations: elements, scale and correction
# instructions by the type of the weights, as FLOATS
INSTRUCTIONS = {
    "f32": FLOATS,
    "f16": FLOATS,
    "bf16": {"avx512": "avx512_bf16"},
    "q8_0": {"avx2": "avx2", "avx512": "avx512_q8_0"},
}
# matrices that ggml's own operations read
LEFT_TO_GGML = ("positions.weight", "router.weight")


class PackedWeights:
    """GEMM with weights in the layout of kernels/packed_weights.h; `instructions` by the type of the weights."""

    def __init__(self, operations: CustomOperations, instructions: Mapping[str, str]) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self.instructions = dict(instructions)
        self._type_names = {TYPE_NUMBERS[name]: name for name in instructions}

    def pack(self, blocks: Mapping[str, WeightBlock], *, also_embedding: bool) -> frozenset[tuple[str, str]]:
        """Pack suitable matrices in place; returns their blocks and names.

        Embeddings are packed only on request: their rows are then read by `take_rows`.
        """
        packed = set()
        for block_name, block in blocks.items():
            for layout in block.tensors:
                if self.is_packed(block_name, layout, also_embedding=also_embedding):
                    self.pack_matrix(layout, block)
                    packed.add((block_name, layout.name))
        return frozenset(packed)

    def is_packed(self, block_name: str, layout: TensorLayout, *, also_embedding: bool) -> bool:
        """Whether a tensor of a block is one that `pack` packs."""
        name = self._type_names.get(layout.type_number)
        if name is None or len(layout.sizes) != 2 or layout.name in LEFT_TO_GGML:
            return False
        length, outputs = layout.sizes
        is_wanted = also_embedding or block_name != "embedding"
        return is_wanted and outputs % GROUP_ROWS == 0 and length % UNIT_ITEMS[name] == 0

    def multiplies(self, weight: int) -> bool:
        """Whether there are kernels for the type of a weight."""
        return int(self._ggml.ggml_tensor.from_address(weight).type) in self._type_names

    def tiles_of(self, weight: int) -> str:
        """The kind of tiles that a packed weight is multiplied by."""
        name = self._type_of(weight)
        return f"{TILES[name]}_{self.instructions[name]}"

    def tiles(self, context: Any, rows: int, kind: str) -> int:
        """Rows [features, count] in float32 as tiles, for any number of products."""
        features, count = self._ggml.ggml_tensor.from_address(rows).ne[:2]
        arrangement, _, instructions = kind.rpartition("_")
        row_bytes = {
            "arrange": 4 * features,
            "arrange_bf16": 2 * features,
            "quantise": features // BLOCK_ITEMS * TILE_BLOCK_BYTES[instructions],
        }[arrangement]
        return self._operations.add(
            context, kind, kind=self._ggml.GGML_TYPE_I8, sizes=(row_bytes, count), sources=(rows,)
        )

    def product(self, context: Any, weight: int, tiles: int) -> int:
        """Like ggml's mul_mat of a packed weight and the rows of the tiles."""
        count = self._ggml.ggml_tensor.from_address(tiles).ne[1]
        outputs = self._ggml.ggml_tensor.from_address(weight).ne[1]
        kind = self._type_of(weight)
        name = f"multiply_{kind}_{self.instructions[kind]}"
        return self._operations.add(context, name, sizes=(outputs, count), sources=(weight, tiles))

    def take_rows(self, context: Any, weight: int, ids: int) -> int:
        """Like ggml's get_rows of a packed weight."""
        features = self._ggml.ggml_tensor.from_address(weight).ne[0]
        count = self._ggml.ggml_tensor.from_address(ids).ne[0]
        name = f"take_rows_{self._type_of(weight)}"
        return self._operations.add(context, name, sizes=(features, count), sources=(weight, ids))

    def pack_matrix(self, layout: TensorLayout, block: WeightBlock) -> None:
        """Pack a matrix in place; several may be packed at once."""
        length, outputs = layout.sizes
        memory = block.bytes_of(layout)
        name = self._type_names[layout.type_number]
        units = length // UNIT_ITEMS[name] if UNIT_BYTES[name] else length
        spare = np.empty(GROUP_ROWS * layout.byte_count // outputs, np.uint8)
        self._operations.library.noodle_pack(
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_void_p(spare.ctypes.data),
            *(ctypes.c_int64(number) for number in (outputs, units, UNIT_BYTES[name])),
        )

    def _type_of(self, weight: int) -> str:
        return self._type_names[int(self._ggml.ggml_tensor.from_address(weight).type)]


def packed_weights(ggml: GgmlCalls, *, only: str | None = None) -> PackedWeights | None:
    """The GEMM kernels (`only` those with some instructions); None if none was built or runs on this processor."""
    operations = own_operations(ggml)
    if operations is None:
        return None
    chosen = {name: fastest(operations, instructions, only) for name, instructions in INSTRUCTIONS.items()}
    available = {name: instructions for name, instructions in chosen.items() if instructions}
    return PackedWeights(operations, available) if available else None
