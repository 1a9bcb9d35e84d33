"""Attention of several tokens by noodle's own kernel, in a graph of ggml; knows no session and no mask.

The kernel is in `kernels/attention.h`, which says how it is faster than ggml's. One token alone is left to ggml: of the
16 queries that the kernel takes at once there are then as many as heads share a head of keys.
"""

from __future__ import annotations

import ctypes
from typing import Any

from services.stage.executors.ggml.calls import GgmlCalls
from services.stage.executors.ggml.custom import FLOATS, CustomOperations, own_operations
from services.stage.executors.ggml.weights import TYPE_NUMBERS

MOST_DIMENSIONS = 256  # of a head
# of which a head's dimensions must be a multiple, by ggml's number of K's and V's type
MULTIPLES = {TYPE_NUMBERS["f32"]: 1, TYPE_NUMBERS["f16"]: 16, TYPE_NUMBERS["q8_0"]: 32}


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class OwnAttention:
    """The kernel with the instructions that this processor runs."""

    def __init__(self, operations: CustomOperations, instructions: str) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self._name = f"attend_{instructions}"
        self._parameters: dict[tuple[float, float, int, int], _Parameters] = {}  # graphs hold their addresses

    def attend(self, context: Any, query: int, key: int, value: int, *, scale: float, cap: float, window: int) -> int:
        """Like ggml's flash_attn_ext with a causal mask of this window (0 is none).

        Q float32 [dimensions, tokens, heads], K and V [dimensions, keys, heads of keys]; the last key is the last
        token's own. Gives [dimensions, heads, tokens].
        """
        tensor = self._ggml.ggml_tensor.from_address
        dimensions, tokens, heads = (int(size) for size in tensor(query).ne[:3])
        fields = (scale, cap, window, int(tensor(key).type))
        parameters = self._parameters.setdefault(fields, _Parameters(*fields))
        sizes, sources = (dimensions, heads, tokens), (query, key, value)
        address = ctypes.addressof(parameters)
        return self._operations.add(context, self._name, self._ggml.GGML_TYPE_F32, sizes, sources, address)


def own_attention(ggml: GgmlCalls, dimensions: int, key_type: int, *, only: str | None = None) -> OwnAttention | None:
    """The kernel for heads of so many dimensions, with K and V in a type by ggml's number.

    None where it was not built, can not take these, or does not run on this processor (`only` with some instructions).
    """
    if key_type not in MULTIPLES or dimensions > MOST_DIMENSIONS or dimensions % MULTIPLES[key_type]:
        return None
    operations = own_operations(ggml)
    instructions = operations.fastest(FLOATS, only) if operations else ""
    return OwnAttention(operations, instructions) if operations and instructions else None
