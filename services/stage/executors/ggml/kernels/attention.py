"""noodle's attention in ggml's graphs."""

from __future__ import annotations

import ctypes
from typing import Any

from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls
from services.stage.executors.ggml.kernels.library import INSTRUCTIONS, fastest, own_operations
from services.stage.executors.ggml.weights import TYPE_NUMBERS

MAX_HEAD_DIM = 256
# by ggml's number of the type of K and V: the head dimension must be a multiple of this
HEAD_DIM_MULTIPLES = {TYPE_NUMBERS["f32"]: 1, TYPE_NUMBERS["f16"]: 16, TYPE_NUMBERS["q8_0"]: 32}


class _AttentionParameters(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class FlashAttentionKernel:
    """Attention of several tokens (kernels/attention.h).

    A single token is left to ggml: it fills only as many of the kernel's 16 query lanes as heads share a KV head.
    """

    def __init__(self, operations: CustomOperations, instructions: str) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self._name = f"attend_{instructions}"
        self._parameters: dict[tuple[float, float, int, int], _AttentionParameters] = {}  # graphs hold their addresses

    def attend(self, context: Any, query: int, key: int, value: int, *, scale: float, cap: float, window: int) -> int:
        """Like ggml's flash_attn_ext with a causal mask of this window (0 is none).

        Q float32 [head_dim, tokens, heads], K and V [head_dim, keys, kv_heads]; the last key belongs to the last token.
        Returns [head_dim, heads, tokens].
        """
        tensor = self._ggml.ggml_tensor.from_address
        dimensions, tokens, heads = (int(size) for size in tensor(query).ne[:3])
        fields = (scale, cap, window, int(tensor(key).type))
        parameters = self._parameters.setdefault(fields, _AttentionParameters(*fields))
        return self._operations.add(
            context,
            self._name,
            sizes=(dimensions, heads, tokens),
            sources=(query, key, value),
            parameters=ctypes.addressof(parameters),
        )


def flash_attention_kernel(
    ggml: GgmlCalls, head_dim: int, key_type: int, *, only: str | None = None
) -> FlashAttentionKernel | None:
    """The kernel for a head dimension and ggml's number of the type of K and V.

    None if it was not built, does not take these, or does not run on this processor (`only` with some instructions).
    """
    if key_type not in HEAD_DIM_MULTIPLES or head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLES[key_type]:
        return None
    operations = own_operations(ggml)
    instructions = fastest(operations, INSTRUCTIONS, only) if operations else ""
    return FlashAttentionKernel(operations, instructions) if operations and instructions else None
