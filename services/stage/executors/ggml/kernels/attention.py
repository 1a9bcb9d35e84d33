"""noodle's attention in ggml's graphs (kernels/attention/): for any number of tokens, over rows of its own layout."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls, SpanRows
from services.stage.executors.ggml.kernels.library import fastest, own_operations
from services.stage.executors.ggml.weights import TYPE_NUMBERS

BLOCK_TOKENS = 32  # whose rows lie together
SEGMENT_TOKENS = 512  # that different threads may compute for a lone token
SPLIT_ROWS = 16  # heads that share a KV head times tokens of a span whose segments may be split
SPLIT_COUNTER_BYTES = 4096
MOST_SCRATCH_BYTES = 64 << 20  # for split segments; steps that need more are not split
MAX_HEAD_DIM = 1024
# by ggml's number of the type of K and V: the head dimension must be a multiple of this
HEAD_DIM_MULTIPLES = {TYPE_NUMBERS["f32"]: 1, TYPE_NUMBERS["f16"]: 1, TYPE_NUMBERS["q8_0"]: 32}


class _RowsFields(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("step", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("key_area", ctypes.c_int64),
        ("value_area", ctypes.c_int64),
    )


class _AttentionFields(_RowsFields):
    """Those of the rows come first."""

    _fields_ = (
        ("window", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What attention of one layer computes with."""

    key_area: int  # of a session's areas
    value_area: int  # the same for latent attention: V is the beginning of K
    scale: float
    cap: float = 0.0  # 0 is none
    window: int = 0  # 0 is none
    sinks: int = 0  # tensor of a score for each head, without a value; 0 is none


class StepSpans:
    """The spans of a step, which all layers of one graph read; `write` places the sessions of the next step."""

    def __init__(self, kernel: FlashAttentionKernel, most_spans: int) -> None:
        self.kernel = kernel
        self._words = np.zeros(3 + 4 * most_spans, np.int64)
        self.address = int(self._words.ctypes.data)

    def write(self, spans: Sequence[SpanRows]) -> None:
        scratch = self.kernel.scratch_for(spans)
        self._words[:3] = scratch.ctypes.data, scratch.nbytes, len(spans)
        places = [(span.address, span.area_bytes, span.first_position, span.token_count) for span in spans]
        self._words[3 : 3 + 4 * len(spans)] = np.array(places, np.int64).reshape(-1)


class FlashAttentionKernel:
    """Attention and the writing of rows, for the heads of one model and one type of K and V."""

    def __init__(
        self,
        operations: CustomOperations,
        instructions: str,
        *,
        heads: int,
        kv_heads: int,
        value_dim: int,
        key_type: int,
    ) -> None:
        self._operations = operations
        self._instructions = instructions
        self._heads, self._kv_heads, self._value_dim = heads, kv_heads, value_dim
        self._key_type = key_type
        self._scratch = np.zeros(SPLIT_COUNTER_BYTES, np.uint8)

    def new_spans(self, most_spans: int) -> StepSpans:
        return StepSpans(self, most_spans)

    def attend(
        self, context: Any, spans: StepSpans, layer: LayerAttention, *, query: int, key: int, value: int | None
    ) -> int:
        """Write K and V of a step's tokens and attend to all rows of their sessions up to each token.

        Q, K and V are float32 [head_dim, heads, tokens]; V is None in latent attention. Returns [value_dim, heads,
        tokens].
        """
        places = (spans.address, self._key_type, layer.key_area, layer.value_area)
        written = self._operations.add(
            context,
            f"write_rows_{self._instructions}",
            sizes=(1,),
            sources=(key,) if value is None else (key, value),
            fields=_RowsFields(*places),
        )
        tokens = int(self._operations.ggml.ggml_tensor.from_address(query).ne[2])
        numbers = (layer.window, self._kv_heads, self._value_dim, layer.scale, layer.cap)
        return self._operations.add(
            context,
            f"attend_{self._instructions}",
            sizes=(self._value_dim, self._heads, tokens),
            sources=(query, written, layer.sinks) if layer.sinks else (query, written),
            fields=_AttentionFields(*places, *numbers),
        )

    def scratch_for(self, spans: Sequence[SpanRows]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Memory in which threads leave their segments' sums; zeroed when it is made."""
        most_tokens = SPLIT_ROWS * self._kv_heads // self._heads
        rows = sum(
            ((span.first_position + span.token_count - 1) // SEGMENT_TOKENS + 1) * span.token_count
            for span in spans
            if span.token_count <= most_tokens
        )
        row_bytes = 4 * (-(-self._value_dim // 32) * 32 + 2) * self._heads
        wanted_bytes = SPLIT_COUNTER_BYTES + rows * row_bytes
        if self._scratch.nbytes < wanted_bytes <= MOST_SCRATCH_BYTES:
            self._scratch = np.zeros(2 * wanted_bytes, np.uint8)
        return self._scratch


def flash_attention_kernel(
    ggml: GgmlCalls,
    key_type: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int = 0,
    only: str | None = None,
) -> FlashAttentionKernel | None:
    """The kernel for these heads and ggml's number of the type of K and V.

    None if it was not built, does not take these, or does not run on this processor (`only` with some instructions).
    """
    multiple = HEAD_DIM_MULTIPLES.get(key_type, 0)
    if not multiple or head_dim > MAX_HEAD_DIM or head_dim % multiple or value_dim % multiple:
        return None
    operations = own_operations(ggml)
    instructions = fastest(operations, only) if operations else ""
    if not operations or not instructions or not hasattr(operations.library, f"noodle_write_rows_{instructions}"):
        return None
    return FlashAttentionKernel(
        operations,
        instructions,
        heads=heads,
        kv_heads=kv_heads,
        value_dim=value_dim or head_dim,
        key_type=key_type,
    )
