"""noodle's matrix products in ggml's graphs."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from noodle.model.ggml_types import GGML_TYPE_BY_NUMBER
from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls
from services.stage.executors.ggml.kernels.library import fastest, own_operations
from services.stage.executors.ggml.weights import GROUP_ROWS, TensorLayout, WeightBlock

FLOAT_TYPES = ("F32", "F16", "BF16")
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
BLOCK_ITEMS, ROW_BLOCK_BYTES = 32, 48  # of activations in 8 bits
# the learned positions, whose rows ggml takes
LEFT_TO_GGML = ("positions.weight",)
EXPERT_PREFIX = "expert_"  # of the names of matrices for each expert


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts that compute each token: a tensor as `struct routes` of kernels/products/layout.h reads it."""

    tensor: int
    slots: int  # experts of a token
    tokens: int


class _Taking(ctypes.Structure):
    """`struct taking` of kernels/products/layout.c, after its work."""

    _fields_ = (("type", ctypes.c_int64), ("to_float", ctypes.c_void_p))


class PackedWeights:
    """Products with weights in the layout of kernels/products/layout.h.

    `instructions` are those of all products. With `rounds_to_bf16` the instruction of AVX512_BF16 multiplies by
    bfloat16 weights, and rounds activations to bfloat16.
    """

    def __init__(self, operations: CustomOperations, instructions: str, *, rounds_to_bf16: bool) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self.instructions = instructions
        self.rounds_to_bf16 = rounds_to_bf16
        self.types = frozenset(FLOAT_TYPES + BLOCK_TYPES)

    def is_packed(self, block_name: str, layout: TensorLayout, *, also_embedding: bool) -> bool:
        """Whether a tensor of a block is to be packed. Embeddings are on request: `take_rows` then takes their rows.

        Experts are packed where each one's matrix is whole groups, so that they stay one after another.
        """
        kind = GGML_TYPE_BY_NUMBER[layout.type_number]
        if not layout.is_matrix or layout.name in LEFT_TO_GGML or kind.name not in self.types:
            return False
        are_experts = layout.name.startswith(EXPERT_PREFIX) and layout.sizes[1] % GROUP_ROWS == 0
        if len(layout.sizes) != 2 and not (len(layout.sizes) == 3 and are_experts):
            return False
        is_wanted = also_embedding or block_name != "embedding"
        return is_wanted and layout.sizes[0] % self._items(kind.number) == 0

    def multiplies(self, weight: int) -> bool:
        """Whether there are kernels for the type of a weight."""
        return self._type_of(weight) in self.types

    def tiles_of(self, weight: int) -> str:
        """The kind of tiles that a packed weight is multiplied by."""
        name = self._type_of(weight)
        if name in BLOCK_TYPES:
            return "quantize"
        return "arrange_pairs" if name == "BF16" and self.rounds_to_bf16 else "arrange"

    def routes(self, context: Any, ids: int, experts: int) -> Routes:
        """Bring the pairs of token and slot of `ids` [slots, tokens] in order of their expert."""
        slots, tokens = self._ggml.ggml_tensor.from_address(ids).ne[:2]
        sizes = (2 * experts + 2 + slots * tokens,)
        tensor = self._operations.add(context, "route", kind=self._ggml.GGML_TYPE_I32, sizes=sizes, sources=(ids,))
        return Routes(tensor, slots, tokens)

    def best_experts(self, context: Any, scores: int, count: int) -> int:
        """Like ggml's argsort_top_k of scores [experts, tokens], for scores that are no numbers too."""
        sizes = (count, self._ggml.ggml_tensor.from_address(scores).ne[1])
        kind = self._ggml.GGML_TYPE_I32
        return self._operations.add(context, "best_experts", kind=kind, sizes=sizes, sources=(scores,))

    def sum_of_experts(self, context: Any, results: int, shares: int) -> int:
        """The sum of results [features, slots, tokens] times their shares [1, slots, tokens], in order of the slots."""
        features, _, tokens = self._ggml.ggml_tensor.from_address(results).ne[:3]
        return self._operations.add(context, "sum_of_experts", sizes=(features, tokens), sources=(results, shares))

    def tiles(self, context: Any, rows: int, kind: str, routes: Routes | None = None) -> int:
        """Rows [features, count] in float32 as tiles, for any number of products.

        For experts the rows are [features, 1 or slots, tokens].
        """
        features, count = self._ggml.ggml_tensor.from_address(rows).ne[:2]
        row_bytes = {
            "arrange": 4 * features,
            "arrange_pairs": 2 * features,
            "quantize": features // BLOCK_ITEMS * ROW_BLOCK_BYTES,
        }[kind]
        sizes = (row_bytes, routes.slots * routes.tokens if routes else count)
        sources = (rows, routes.tensor) if routes else (rows,)
        name = f"{kind}_{self.instructions}"
        return self._operations.add(context, name, kind=self._ggml.GGML_TYPE_I8, sizes=sizes, sources=sources)

    def product(self, context: Any, weight: int, tiles: int, routes: Routes | None = None) -> int:
        """Like ggml's mul_mat of a packed weight and the rows of the tiles, or with routes like its mul_mat_id."""
        count = self._ggml.ggml_tensor.from_address(tiles).ne[1]
        outputs = self._ggml.ggml_tensor.from_address(weight).ne[1]
        kind = self._type_of(weight)
        kind = "BF16_PAIRS" if kind == "BF16" and self.rounds_to_bf16 else kind
        sizes = (outputs, routes.slots, routes.tokens) if routes else (outputs, count)
        sources = (weight, tiles, routes.tensor) if routes else (weight, tiles)
        return self._operations.add(context, f"multiply_{kind}_{self.instructions}", sizes=sizes, sources=sources)

    def take_rows(self, context: Any, weight: int, ids: int) -> int:
        """Like ggml's get_rows of a packed weight."""
        ggml = self._ggml
        fields = ggml.ggml_tensor.from_address(weight)
        count = ggml.ggml_tensor.from_address(ids).ne[0]
        traits = ggml.ggml_type_traits.from_address(ggml.ggml_get_type_traits(fields.type))
        taking = _Taking(fields.type, ctypes.cast(traits.to_float, ctypes.c_void_p).value)
        sizes = (fields.ne[0], count)
        return self._operations.add(context, "take_rows", sizes=sizes, sources=(weight, ids), fields=taking)

    def pack(self, layout: TensorLayout, block: WeightBlock) -> None:
        """Pack a matrix in place, with the rows that fill up its last group; several may be packed at once.

        Experts are one matrix after another.
        """
        length, outputs = layout.sizes[0], math.prod(layout.sizes[1:])
        kind = GGML_TYPE_BY_NUMBER[layout.type_number]
        groups = -(-outputs // GROUP_ROWS)
        items = self._items(kind.number)
        spare = np.empty(GROUP_ROWS * kind.byte_count(length), np.uint8)
        self._operations.library.noodle_pack(
            ctypes.c_void_p(block.memory.ctypes.data + layout.offset),
            ctypes.c_void_p(spare.ctypes.data),
            *(ctypes.c_int64(number) for number in (groups * GROUP_ROWS, length // items, kind.number)),
        )

    def _items(self, type_number: int) -> int:
        """Elements of a row that stay together."""
        return int(self._operations.library.noodle_packed_items(ctypes.c_int64(type_number)))

    def _type_of(self, weight: int) -> str:
        return GGML_TYPE_BY_NUMBER[int(self._ggml.ggml_tensor.from_address(weight).type)].name


def packed_weights(ggml: GgmlCalls, *, only: str | None = None) -> PackedWeights | None:
    """The products (`only` those of some instructions); None if none was built or runs on this processor."""
    operations = own_operations(ggml)
    instructions = fastest(operations, only) if operations is not None else ""
    if operations is None or not instructions:
        return None
    rounds_to_bf16 = instructions == "avx512" and operations.supports("avx512_bf16")
    return PackedWeights(operations, instructions, rounds_to_bf16=rounds_to_bf16)
