"""Weights as noodle's own kernels take them, and products by them in a graph of ggml; knows no layer.

The kernels are in `kernels/`, of which `packed_rows.h` says how they are faster than ggml's. They are built beside
ggml's libraries where a compiler was; without them, or on a processor that lacks what they use, ggml's own compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from services.stage.executors.ggml.calls import GgmlCalls
from services.stage.executors.ggml.custom import FLOATS, CustomOperations, own_operations
from services.stage.executors.ggml.weights import TYPE_NUMBERS, Block, Placed

GROUP_ROWS = 16  # of a weight stand side by side
BLOCK_ITEMS = 32  # of Q8_0
UNIT_NUMBERS = {"f32": 1, "f16": 1, "bf16": 2, "q8_0": BLOCK_ITEMS}  # that stand together, row by row
UNIT_BYTES = {"f32": 4, "f16": 2, "bf16": 4, "q8_0": 0}  # 0 is in blocks
TILES = {"f32": "arrange", "f16": "arrange", "bf16": "arrange_bf16", "q8_0": "quantise"}
# of a block of activations for Q8_0: its numbers, its scale and what corrects for unsigned weights
TILE_BLOCK_BYTES = {"avx2": 72, "avx512": 40}
# as FLOATS, by the type of the weights
INSTRUCTIONS = {
    "f32": FLOATS,
    "f16": FLOATS,
    "bf16": {"avx512": "avx512_bf16"},
    "q8_0": {"avx2": "avx2", "avx512": "avx512_q8_0"},
}
# matrices that ggml itself takes rows of or multiplies by, and not LayerGraph's products
LEFT_TO_GGML = ("positions.weight", "router.weight")


class PackedRows:
    """The kernels that this processor runs, as operations of ggml's graphs.

    `instructions` are those to use, by the type of the weights.
    """

    def __init__(self, operations: CustomOperations, instructions: Mapping[str, str]) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self.instructions = dict(instructions)
        self._type_names = {TYPE_NUMBERS[name]: name for name in instructions}

    @property
    def types(self) -> frozenset[str]:
        """Of weights that they multiply by."""
        return frozenset(self._type_names.values())

    def pack(self, blocks: Mapping[str, Block], *, also_embedding: bool) -> frozenset[tuple[str, str]]:
        """Lay out in place what can be, and give it by block and name.

        Embeddings, which rows are taken from, only where asked for: then by `take_rows`.
        """
        packed = set()
        for block_name, block in blocks.items():
            if block_name == "embedding" and not also_embedding:
                continue
            for placed in block.tensors:
                if self._is_taken(placed):
                    self._pack(placed, block)
                    packed.add((block_name, placed.name))
        return frozenset(packed)

    def tiles_of(self, weight: int) -> str:
        """The kind of tiles that a packed weight is multiplied by."""
        name = self._type_of(weight)
        return f"{TILES[name]}_{self.instructions[name]}"

    def tiles(self, context: Any, rows: int, kind: str) -> int:
        """Rows [features, count] in float32 as tiles, for any number of products."""
        features, count = self._ggml.ggml_tensor.from_address(rows).ne[:2]
        arrangement, _, instructions = kind.rpartition("_")
        bytes_of_row = {
            "arrange": 4 * features,
            "arrange_bf16": 2 * features,
            "quantise": features // BLOCK_ITEMS * TILE_BLOCK_BYTES[instructions],
        }[arrangement]
        return self._operations.add(context, kind, self._ggml.GGML_TYPE_I8, (bytes_of_row, count), (rows,))

    def product(self, context: Any, weight: int, tiles: int) -> int:
        """Like ggml's mul_mat of a weight that was packed and the rows that the tiles were made of."""
        count = self._ggml.ggml_tensor.from_address(tiles).ne[1]
        outputs = self._ggml.ggml_tensor.from_address(weight).ne[1]
        kind = self._type_of(weight)
        name = f"multiply_{kind}_{self.instructions[kind]}"
        return self._operations.add(context, name, self._ggml.GGML_TYPE_F32, (outputs, count), (weight, tiles))

    def take_rows(self, context: Any, weight: int, ids: int) -> int:
        """Like ggml's get_rows of a weight that was packed."""
        features = self._ggml.ggml_tensor.from_address(weight).ne[0]
        count = self._ggml.ggml_tensor.from_address(ids).ne[0]
        name = f"take_rows_{self._type_of(weight)}"
        return self._operations.add(context, name, self._ggml.GGML_TYPE_F32, (features, count), (weight, ids))

    def _is_taken(self, placed: Placed) -> bool:
        name = self._type_names.get(placed.type_number)
        if name is None or len(placed.sizes) != 2 or placed.name in LEFT_TO_GGML:
            return False
        length, outputs = placed.sizes
        return outputs % GROUP_ROWS == 0 and length % UNIT_NUMBERS[name] == 0

    def _pack(self, placed: Placed, block: Block) -> None:
        length, outputs = placed.sizes
        memory = block.memory[placed.offset : placed.offset + placed.byte_count]
        name = self._type_names[placed.type_number]
        units = length // UNIT_NUMBERS[name] if UNIT_BYTES[name] else length
        spare = np.empty(GROUP_ROWS * placed.byte_count // outputs, np.uint8)
        self._operations.library.noodle_pack(
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_void_p(spare.ctypes.data),
            *(ctypes.c_int64(number) for number in (outputs, units, UNIT_BYTES[name])),
        )

    def _type_of(self, weight: int) -> str:
        return self._type_names[int(self._ggml.ggml_tensor.from_address(weight).type)]


def packed_rows(ggml: GgmlCalls, *, only: str | None = None) -> PackedRows | None:
    """The kernels where they were built and this processor runs any (`only` those of some instructions), else None."""
    operations = own_operations(ggml)
    if operations is None:
        return None
    fastest = {name: operations.fastest(ways, only) for name, ways in INSTRUCTIONS.items()}
    run = {name: instructions for name, instructions in fastest.items() if instructions}
    return PackedRows(operations, run) if run else None
