"""A layer's mathematics as ggml operations, for every family of families.py.

Activations are float32 [features, tokens] in ggml's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.stage.executors.ggml.families import ModelShape
from services.stage.executors.ggml.graph import GraphMemory, MaskSlot, SlotTensors
from services.stage.executors.ggml.kernels import (
    DotCounts,
    FlashAttentionKernel,
    PackedWeights,
    new_expert_zero,
    product_by_dots,
)

ITEM_BYTES = 4  # of activations
NEOX, INTERLEAVED = 2, 0  # how the dimensions of a head are paired for rotary positions
# operations of a layer at most, and of each of its spans: a graph's memory is sized before it is built
LAYER_TENSORS, SPAN_TENSORS = 88, 16
# From TILED_ROWS rows on, pad to a full tile: the tiled kernel is faster even with padding.
TILE_ROWS, TILED_ROWS = 64, 22
TILED_TYPES = (0, 1)  # of K and V: float32 and float16


@dataclass(frozen=True)
class SliceTensors:
    """A slice's weights as ggml tensors, and how to compute with them."""

    layers: tuple[dict[str, int], ...]
    embedding: int  # 0 off the first stage
    positions: int
    final_norm: dict[str, int]
    head: dict[str, int]
    frequency_factors: tuple[int, ...]  # by layer; 0 without rotary positions
    pairing: int  # NEOX or INTERLEAVED
    key_type: int  # of K and V
    row_bytes: int  # of a token's K in one layer
    exact: bool  # float32 throughout: ggml's GELU table, which is float16, is not used
    dot_counts: DotCounts = field(default_factory=dict)
    kernels: PackedWeights | None = None
    packed: frozenset[int] = frozenset()  # the matrices that these kernels multiply by
    attention: FlashAttentionKernel | None = None  # for several tokens


class LayerGraph:
    """Builds the operations of one step into a graph's memory."""

    def __init__(self, memory: GraphMemory, shape: ModelShape, tensors: SliceTensors, start_layer: int) -> None:
        self._memory = memory
        self._ggml = memory.ggml
        self._context = memory.context
        self._shape = shape
        self._tensors = tensors
        self._start_layer = start_layer
        self.slots = SlotTensors()
        self._counts: Sequence[int] = ()  # tokens of each span
        self._positions = 0
        self._attended = 0  # shared by all layers: every span's attention is written into its place here
        self._masks: dict[tuple[int, int], int] = {}  # by span and window
        self._tiles: dict[tuple[int, str], int] = {}  # rows in the kernels' layout, by their tensor and kind
        self.expert_zero = 0  # for products by dots; written once the graph is allocated

    def embed(self, token_ids: int) -> int:
        """Token embeddings, scaled as the family does."""
        embedding, kernels = self._tensors.embedding, self._tensors.kernels
        if kernels is not None and embedding in self._tensors.packed:
            taken = kernels.take_rows(self._context, embedding, token_ids)
        else:
            taken = self._call("get_rows", embedding, token_ids)
        return self._scaled(taken, self._shape.token_scale)

    def enter(self, hidden: int, positions: int) -> int:
        """Apply what a family does to the input of its first layer."""
        hidden = self._scaled(hidden, self._shape.input_scale)
        if self._tensors.positions:
            hidden = self._call("add", hidden, self._call("get_rows", self._tensors.positions, positions))
        return hidden

    def layers(self, hidden: int, positions: int, counts: Sequence[int]) -> int:
        """All layers of the slice, over spans of these token counts."""
        shape = self._shape
        self._positions, self._counts = positions, counts
        padding = max(self._attended_rows(count) - count for count in counts)
        if len(counts) > 1 or padding:
            # the padding rows of a span are overwritten by the next span
            attended = self._call("new_tensor_2d", 0, shape.heads * shape.head_dim, sum(counts) + padding)
            self._attended = self._memory.persist(attended)
        for number, weights in enumerate(self._tensors.layers):
            attended = self._attention(self._norm(hidden, weights, "attention_norm"), number, weights)
            attended = self._norm(attended, weights, "attention_post_norm")
            hidden = self._call("add", hidden, self._scaled(attended, shape.residual_scale))
            inner = self._norm(hidden, weights, "feed_forward_norm")
            inner = self._experts(inner, weights) if "router.weight" in weights else self._feed_forward(inner, weights)
            inner = self._norm(inner, weights, "feed_forward_post_norm")
            hidden = self._call("add", hidden, self._scaled(inner, shape.residual_scale))
        return hidden

    def head(self, hidden: int) -> int:
        shape = self._shape
        logits = self._linear(self._norm(hidden, self._tensors.final_norm, "final_norm"), self._tensors.head, "head")
        logits = self._scaled(logits, shape.logit_scale)
        if shape.logit_cap:
            capped = self._call("tanh", self._scaled(logits, 1 / shape.logit_cap))
            logits = self._scaled(capped, shape.logit_cap)
        return logits

    def _call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._ggml, f"ggml_{name}")(self._context, *arguments))

    def _view(self, tensor: int, sizes: Sequence[int], strides: Sequence[int], offset: int) -> int:
        """A part of a tensor; `strides` are those of all axes but the first, in bytes."""
        return self._call(f"view_{len(sizes)}d", tensor, *sizes, *strides, offset)

    def _scaled(self, tensor: int, factor: float) -> int:
        return tensor if factor == 1.0 else self._call("scale", tensor, factor)

    def _linear(self, tensor: int, weights: dict[str, int], name: str) -> int:
        result = self._product(weights[f"{name}.weight"], tensor)
        bias = weights.get(f"{name}.bias")
        return result if bias is None else self._call("add", result, bias)

    def _product(self, weight: int, rows: int) -> int:
        ggml, kernels = self._ggml, self._tensors.kernels
        if kernels is not None and weight in self._tensors.packed:
            key = (rows, kernels.tiles_of(weight))
            if key not in self._tiles:
                self._tiles[key] = kernels.tiles(self._context, *key)
            return kernels.product(self._context, weight, self._tiles[key])
        count = int(ggml.ggml_tensor.from_address(rows).ne[1])
        kind = int(ggml.ggml_tensor.from_address(weight).type)
        if count not in self._tensors.dot_counts.get(kind, ()):
            return self._call("mul_mat", weight, rows)
        self.expert_zero = self.expert_zero or new_expert_zero(self._memory, count)
        return product_by_dots(ggml, self._context, weight, rows, self.expert_zero)

    def _norm(self, tensor: int, weights: dict[str, int], name: str) -> int:
        """Apply a norm of the layer, if the layer has it."""
        weight = weights.get(f"{name}.weight")
        if weight is None:
            return tensor
        kind = "rms_norm" if self._shape.family.norm == "rms" else "norm"
        normed = self._call("mul", self._call(kind, tensor, self._shape.norm_epsilon), weight)
        bias = weights.get(f"{name}.bias")
        return normed if bias is None else self._call("add", normed, bias)

    def _attention(self, tensor: int, number: int, weights: dict[str, int]) -> int:
        slots, width = self.slots, self._shape.heads * self._shape.head_dim
        query, key, value = self._query_key_value(tensor, number, weights)
        slots.add_layer()
        begin = attended = 0
        for index, count in enumerate(self._counts):
            self._write_rows(key.from_token(begin), count, slots.key_written[-1], slots.key_target[-1])
            self._write_rows(value.from_token(begin), count, slots.value_written[-1], slots.value_target[-1])
            attended = self._attend(query.from_token(begin), number, index, count)
            if self._attended:
                self._memory.place_in(attended, self._attended, begin * width * ITEM_BYTES)
                self._ggml.ggml_build_forward_expand(self._memory.graph, attended)
            begin += count
        if self._attended:
            joined = self._view(self._attended, (width, begin), (width * ITEM_BYTES,), 0)
        else:
            joined = self._call("reshape_2d", attended, width, begin)
        return self._linear(joined, weights, "output")

    def _query_key_value(self, tensor: int, number: int, weights: dict[str, int]) -> tuple[_Rows, _Rows, _Rows]:
        """Q, K and V of all tokens, normed and with rotary positions."""
        shape = self._shape
        query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if "query_key_value.weight" in weights:
            whole = self._linear(tensor, weights, "query_key_value")
            stride = (query_width + 2 * key_width) * ITEM_BYTES
            query = _Rows(whole, 0, stride)
            key = _Rows(whole, query_width * ITEM_BYTES, stride)
            value = _Rows(whole, (query_width + key_width) * ITEM_BYTES, stride)
        else:
            query, key, value = (
                _Rows(self._linear(tensor, weights, name), 0, width * ITEM_BYTES)
                for name, width in (("query", query_width), ("key", key_width), ("value", key_width))
            )
        factors, norm_heads = self._tensors.frequency_factors[number], "query_key_norm.weight" in weights
        if query.tensor == key.tensor and "query_norm.weight" not in weights:
            # q and k lie side by side, so one operation serves both
            if factors or norm_heads:
                both = self._heads(query, shape.heads + shape.kv_heads)
                if norm_heads:
                    both = self._call("rms_norm", both, shape.norm_epsilon)
                    both = self._call("mul", both, weights["query_key_norm.weight"])
                if factors:
                    both = self._apply_rotary(both, number)
                stride = (query_width + key_width) * ITEM_BYTES
                query, key = _Rows(both, 0, stride), _Rows(both, query_width * ITEM_BYTES, stride)
            return query, key, value
        query = self._query_or_key(query, shape.heads, number, weights.get("query_norm.weight"))
        key = self._query_or_key(key, shape.kv_heads, number, weights.get("key_norm.weight"))
        return query, key, value

    def _query_or_key(self, rows: _Rows, heads: int, number: int, norm: int | None) -> _Rows:
        """Q or K alone, normed over each head or over all of them, and with rotary positions."""
        width = heads * self._shape.head_dim
        if norm is not None:
            if self._shape.family.query_key_norm == "heads":
                tensor = self._heads(rows, heads)
            else:
                tensor = self._view(rows.tensor, (width, sum(self._counts)), (rows.stride,), rows.offset)
            tensor = self._call("mul", self._call("rms_norm", tensor, self._shape.norm_epsilon), norm)
            rows = _Rows(tensor, 0, width * ITEM_BYTES)
        if self._tensors.frequency_factors[number]:
            rows = _Rows(self._apply_rotary(self._heads(rows, heads), number), 0, width * ITEM_BYTES)
        return rows

    def _heads(self, rows: _Rows, heads: int) -> int:
        head_dim = self._shape.head_dim
        sizes, strides = (head_dim, heads, sum(self._counts)), (head_dim * ITEM_BYTES, rows.stride)
        return self._view(rows.tensor, sizes, strides, rows.offset)

    def _apply_rotary(self, heads: int, number: int) -> int:
        """Apply rotary positions. The factors hold the frequencies: with a base of 1 the angle is the position."""
        rotary = self._shape.rotaries[self._start_layer + number]
        if rotary is None:
            raise ValueError(f"layer {self._start_layer + number} has no rotary positions")
        original_length, base, scale, extrapolation, beta_fast, beta_slow = 0, 1.0, 1.0, 0.0, 32.0, 1.0
        frequencies = (original_length, base, scale, extrapolation, rotary.scaling, beta_fast, beta_slow)
        factors, dimensions = self._tensors.frequency_factors[number], 2 * len(rotary.frequencies)
        pairs = (factors, dimensions, self._tensors.pairing)
        return self._call("rope_ext", heads, self._positions, *pairs, *frequencies)

    def _write_rows(self, rows: _Rows, count: int, written: list[int], targets: list[int]) -> None:
        """Copy K or V of one span into its session's rows."""
        width = self._shape.kv_heads * self._shape.head_dim
        source = self._view(rows.tensor, (width, count), (rows.stride,), rows.offset)
        target = self._memory.outside(self._call("new_tensor_2d", self._tensors.key_type, width, count))
        copied = self._call("cpy", source, target)
        self._ggml.ggml_build_forward_expand(self._memory.graph, copied)
        written.append(self._memory.word(copied) + self._memory.at_data)
        targets.append(self._memory.word(target) + self._memory.at_data)

    def _attend(self, query: _Rows, number: int, index: int, count: int) -> int:
        """Attention of span `index` over its session's rows."""
        shape, memory, slots = self._shape, self._memory, self.slots
        key = self._slot(slots.key_data[-1], slots.key_count[-1])
        value = self._slot(slots.value_data[-1], slots.value_count[-1])
        sizes, strides = (shape.head_dim, count, shape.heads), (query.stride, shape.head_dim * ITEM_BYTES)
        own = self._view(query.tensor, sizes, strides, query.offset)
        window = shape.windows[self._start_layer + number]
        scale, cap = shape.attention_scale, shape.attention_cap
        if count > 1 and self._tensors.attention is not None:
            return self._tensors.attention.attend(self._context, own, key, value, scale=scale, cap=cap, window=window)
        rows = self._attended_rows(count)
        mask = None
        if count > 1:  # a single token attends to all rows that it is given
            mask = self._masks.get((index, window))
            if mask is None:
                mask = self._masks[index, window] = memory.outside(self._call("new_tensor_2d", 1, 1, rows))
                slots.masks.append(MaskSlot(index, window, rows, memory.word(mask)))
        if rows > count:
            padding = (0, rows - count, 0, 0)
            own = self._call("pad", self._call("cont", own), *padding)
        sources, factors = (own, key, value, mask), (scale, 0.0, cap)  # the second factor is the largest ALiBi bias
        return self._call("flash_attn_ext", *sources, *factors)

    def _attended_rows(self, count: int) -> int:
        """Number of rows that attention computes for a span of `count` tokens; the rows beyond are discarded."""
        is_tiled = TILED_ROWS <= count < TILE_ROWS and self._tensors.key_type in TILED_TYPES
        is_tiled = is_tiled and self._memory.device.is_host and self._tensors.attention is None
        return TILE_ROWS if is_tiled else count

    def _slot(self, data: list[int], counts: list[int]) -> int:
        """K or V of one session in one layer; its address and length are written before each step."""
        shape, memory = self._shape, self._memory
        slot = memory.outside(self._call("new_tensor_3d", self._tensors.key_type, shape.head_dim, 1, shape.kv_heads))
        at = memory.word(slot)
        memory.words[at + memory.at_strides + 1] = self._tensors.row_bytes
        memory.words[at + memory.at_strides + 2] = self._tensors.row_bytes // shape.kv_heads
        data.append(at + memory.at_data)
        counts.append(at + memory.at_sizes + 1)
        return slot

    def _feed_forward(self, tensor: int, weights: dict[str, int]) -> int:
        if "gate_up.weight" in weights:
            inner = self._gated(self._linear(tensor, weights, "gate_up"))
        elif "gate.weight" in weights:
            inner = self._gated(self._linear(tensor, weights, "gate"), self._linear(tensor, weights, "up"))
        else:
            inner = self._activated(self._linear(tensor, weights, "up"))
        return self._linear(inner, weights, "down")

    def _gated(self, gate: int, up: int | None = None) -> int:
        """The activation of the gate times `up`, which may be the second half of the gate's tensor."""
        kind = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu_erf"}[self._shape.activation]
        if kind == "geglu" and self._tensors.exact:
            if up is None:
                gate, up = self._halves(gate)
            return self._call("mul", self._activated(gate), up)
        return self._call(kind, gate) if up is None else self._call(f"{kind}_split", gate, up)

    def _halves(self, tensor: int) -> tuple[int, int]:
        fields = self._ggml.ggml_tensor.from_address(tensor)
        half = fields.ne[0] // 2
        sizes, strides = (half, *fields.ne[1:3]), fields.nb[1:3]
        first, second = (self._view(tensor, sizes, strides, offset) for offset in (0, half * ITEM_BYTES))
        return self._call("cont", first), second

    def _activated(self, tensor: int) -> int:
        kind = self._shape.activation
        if kind == "silu":
            return self._call("silu", tensor)
        if kind == "gelu":
            return self._call("gelu_erf", tensor)
        if not self._tensors.exact:
            return self._call("gelu", tensor)
        # equal to x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))
        factor = 2 * math.sqrt(2 / math.pi)
        inner = self._call("scale_bias", self._call("sqr", tensor), 0.044715 * factor, factor)
        return self._call("mul", tensor, self._call("sigmoid", self._call("mul", inner, tensor)))

    def _experts(self, tensor: int, weights: dict[str, int]) -> int:
        """The weighted sum of the experts that the router chooses for each token."""
        shape = self._shape
        tokens = int(self._ggml.ggml_tensor.from_address(tensor).ne[1])
        chosen_count = shape.experts_per_token
        shares = self._call("soft_max", self._call("mul_mat", weights["router.weight"], tensor))
        chosen = self._call("argsort_top_k", shares, chosen_count)
        shares = self._call("get_rows", self._call("reshape_3d", shares, 1, shape.experts, tokens), chosen)
        if shape.normalised_experts:
            shares = self._call("reshape_2d", shares, chosen_count, tokens)
            shares = self._call("div", shares, self._call("sum_rows", shares))
            shares = self._call("reshape_3d", shares, 1, chosen_count, tokens)
        each = self._call("reshape_3d", tensor, shape.hidden_size, 1, tokens)
        names = ("gate_up",) if "expert_gate_up.weight" in weights else ("gate", "up")
        inner = self._gated(
            *(self._call("mul_mat_id", weights[f"expert_{name}.weight"], each, chosen) for name in names)
        )
        results = self._call("mul", self._call("mul_mat_id", weights["expert_down.weight"], inner, chosen), shares)
        row_bytes = shape.hidden_size * ITEM_BYTES
        sizes, strides = (shape.hidden_size, tokens), (row_bytes * chosen_count,)
        total = 0
        for expert in range(chosen_count):
            one = self._view(results, sizes, strides, expert * row_bytes)
            total = self._call("add", total, one) if total else one
        return total if chosen_count > 1 else self._call("cont", total)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Q, K or V of all tokens inside a tensor: from `offset` on, a token every `stride` bytes."""

    tensor: int
    offset: int
    stride: int

    def from_token(self, token: int) -> _Rows:
        return _Rows(self.tensor, self.offset + token * self.stride, self.stride)
