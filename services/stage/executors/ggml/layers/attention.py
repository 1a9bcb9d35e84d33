"""Attention of a step's sessions, each over its own K and V rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.stage.executors.ggml.graph import MaskSlot, SlotTensors
from services.stage.executors.ggml.kernels.attention import LayerAttention, StepSpans
from services.stage.executors.ggml.layers.operations import ITEM_BYTES, Operations
from services.stage.executors.ggml.shape import LatentShape

# From TILED_ROWS rows on, pad to a full tile: the tiled kernel is faster even with padding.
TILE_ROWS, TILED_ROWS = 64, 22
TILED_TYPES = (0, 1)  # of K and V: float32 and float16
SWAPPED = (0, 2, 1, 3)  # heads and tokens
LATENT_EPSILON = 1e-6  # of the norms of latent vectors, whatever the model's other norms have


class Attention:
    """Adds the attention of all layers of a slice to one graph."""

    def __init__(self, operations: Operations, start_layer: int, positions: int, counts: Sequence[int]) -> None:
        """`positions` is the tensor of all tokens' positions, `counts` the number of tokens of each span."""
        self._operations = operations
        self._memory, self._ggml, self._context = operations.memory, operations.ggml, operations.context
        self._shape, self._tensors = operations.shape, operations.tensors
        self._call, self._view = operations.call, operations.view
        self._start_layer = start_layer
        self._positions = positions
        self._counts = counts
        self.slots = SlotTensors()
        kernel = self._tensors.attention
        self.spans = kernel.new_spans(sum(counts)) if kernel is not None else None
        self._attended = 0  # shared by all layers: every span's attention is written into its place here
        self._query_scales = 0
        if self._tensors.query_scales:
            scales = self._call("get_rows", self._tensors.query_scales, positions)
            self._query_scales = self._call("reshape_3d", scales, 1, 1, sum(counts))
        self._masks: dict[tuple[int, int], int] = {}  # by span and window
        padding = max(self._attended_rows(count) - count for count in counts)
        if self.spans is None and (len(counts) > 1 or padding):
            # the padding rows of a span are overwritten by the next span
            width = self._shape.heads * self._shape.value_dim
            self._attended = self._memory.persist(self._call("new_tensor_2d", 0, width, sum(counts) + padding))

    def attend(self, tensor: int, number: int, weights: dict[str, int]) -> int:
        """Attention of layer `number` of the slice over normed hidden states [hidden_size, tokens]."""
        latent = self._shape.latent
        if latent:
            query, key, value = self._latent_query_key(tensor, number, weights, latent)
        else:
            query, key, value = self._query_key_value(tensor, number, weights)
        if self._query_scales:
            scaled = self._call("mul", self._heads(query, self._shape.heads), self._query_scales)
            query = _Rows(scaled, 0, self._shape.heads * self._shape.head_dim * ITEM_BYTES)
        sinks = weights.get("sinks.weight", 0)
        if self.spans is not None:
            joined = self._attend_at_once(self.spans, (query, key, value), number, sinks)
        else:
            joined = self._attend_by_span(query, key, value, number, sinks)
        if latent:
            joined = self._values_of_latent(joined, weights, latent)
        joined = self._operations.norm(joined, weights, "attention_inner_norm")
        return self._operations.linear(joined, weights, "output")

    def _attend_at_once(
        self, spans: StepSpans, rows: tuple[_Rows, _Rows, _Rows | None], number: int, sinks: int
    ) -> int:
        """Attention of all spans by noodle's kernel, which is given them before each step."""
        shape = self._shape
        query, key, value = rows
        layer = LayerAttention(
            key_area=number * shape.areas,
            value_area=(number + 1) * shape.areas - 1,
            scale=shape.attention_scale,
            cap=shape.attention_cap,
            window=shape.windows[self._start_layer + number],
            sinks=sinks,
        )
        own_value = None if value is None else self._heads(value, shape.kv_heads)
        own_query, own_key = self._heads(query, shape.heads), self._heads(key, shape.kv_heads)
        attended = spans.kernel.attend(self._context, spans, layer, query=own_query, key=own_key, value=own_value)
        return self._call("reshape_2d", attended, shape.heads * shape.value_dim, sum(self._counts))

    def _attend_by_span(self, query: _Rows, key: _Rows, value: _Rows | None, number: int, sinks: int) -> int:
        """Attention by ggml, one operation for each span."""
        slots, width = self.slots, self._shape.heads * self._shape.value_dim
        slots.add_layer()
        begin = attended = 0
        for index, count in enumerate(self._counts):
            self._write_rows(key.from_token(begin), count, slots.key_written[-1], slots.key_target[-1])
            if value is None:
                slots.value_written[-1].append(slots.key_written[-1][-1])
                slots.value_target[-1].append(slots.key_target[-1][-1])
            else:
                self._write_rows(value.from_token(begin), count, slots.value_written[-1], slots.value_target[-1])
            attended = self._attend(query.from_token(begin), number, index, count)
            if sinks:
                self._ggml.ggml_flash_attn_ext_add_sinks(attended, sinks)
            if self._attended:
                self._memory.place_in(attended, self._attended, begin * width * ITEM_BYTES)
                self._ggml.ggml_build_forward_expand(self._memory.graph, attended)
            begin += count
        if self._attended:
            return self._view(self._attended, (width, begin), (width * ITEM_BYTES,), 0)
        return self._call("reshape_2d", attended, width, begin)

    def _latent_query_key(
        self, tensor: int, number: int, weights: dict[str, int], latent: LatentShape
    ) -> tuple[_Rows, _Rows, None]:
        """Q of all heads in the latent vector's space, and the row that stands for K and V of all heads."""
        operations, shape = self._operations, self._shape
        heads, tokens = shape.heads, sum(self._counts)
        head_dim = latent.plain_dim + latent.rotary_dim
        asked = tensor
        if "query_latent.weight" in weights:
            asked = operations.linear(tensor, weights, "query_latent")
            asked = operations.norm(asked, weights, "query_latent_norm", LATENT_EPSILON)
        whole = operations.linear(asked, weights, "query")
        strides = (head_dim * ITEM_BYTES, heads * head_dim * ITEM_BYTES)
        plain = self._view(whole, (latent.plain_dim, heads, tokens), strides, 0)
        turned = self._view(whole, (latent.rotary_dim, heads, tokens), strides, latent.plain_dim * ITEM_BYTES)
        by_head = self._call("permute", plain, *SWAPPED)
        projected = self._call("permute", self._call("mul_mat", weights["key_of_latent.weight"], by_head), *SWAPPED)
        query = self._call("concat", projected, self._rotated(turned, number), 0)
        row = operations.linear(tensor, weights, "latent")
        row_bytes = shape.head_dim * ITEM_BYTES
        vector = self._view(row, (latent.rank, tokens), (row_bytes,), 0)
        vector = operations.norm(vector, weights, "latent_norm", LATENT_EPSILON)
        vector = self._call("reshape_3d", vector, latent.rank, 1, tokens)
        shared = self._view(row, (latent.rotary_dim, 1, tokens), (row_bytes, row_bytes), latent.rank * ITEM_BYTES)
        key = self._call("concat", vector, self._rotated(shared, number), 0)
        return _Rows(query, 0, heads * row_bytes), _Rows(key, 0, row_bytes), None

    def _values_of_latent(self, attended: int, weights: dict[str, int], latent: LatentShape) -> int:
        """V of each head from its weighted sum of latent vectors [heads * rank, tokens]."""
        heads, tokens = self._shape.heads, sum(self._counts)
        by_head = self._call("permute", self._call("reshape_3d", attended, latent.rank, heads, tokens), *SWAPPED)
        values = self._call("permute", self._call("mul_mat", weights["value_of_latent.weight"], by_head), *SWAPPED)
        return self._call("cont_2d", values, heads * latent.value_dim, tokens)

    def _query_key_value(self, tensor: int, number: int, weights: dict[str, int]) -> tuple[_Rows, _Rows, _Rows]:
        """Q, K and V of all tokens, normed and with rotary positions."""
        shape = self._shape
        query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if "query_key_value.weight" in weights:
            whole = self._operations.linear(tensor, weights, "query_key_value")
            stride = (query_width + 2 * key_width) * ITEM_BYTES
            query = _Rows(whole, 0, stride)
            key = _Rows(whole, query_width * ITEM_BYTES, stride)
            value = _Rows(whole, (query_width + key_width) * ITEM_BYTES, stride)
        else:
            query, key, value = (
                _Rows(self._operations.linear(tensor, weights, name), 0, width * ITEM_BYTES)
                for name, width in (("query", query_width), ("key", key_width), ("value", key_width))
            )
        factors, norm_heads = self._tensors.frequency_factors[number], "query_key_norm.weight" in weights
        if query.tensor == key.tensor and "query_norm.weight" not in weights:
            # q and k lie side by side, so one operation serves both
            if factors or norm_heads:
                both = self._heads(query, shape.heads + shape.kv_heads)
                if factors and shape.family.norms_after_rotary:
                    both = self._apply_rotary(both, number)
                if norm_heads:
                    both = self._operations.norm(both, weights, "query_key_norm")
                if factors and not shape.family.norms_after_rotary:
                    both = self._apply_rotary(both, number)
                stride = (query_width + key_width) * ITEM_BYTES
                query, key = _Rows(both, 0, stride), _Rows(both, query_width * ITEM_BYTES, stride)
            return query, key, value
        query = self._query_or_key(query, shape.heads, number, weights, "query_norm")
        key = self._query_or_key(key, shape.kv_heads, number, weights, "key_norm")
        return query, key, value

    def _query_or_key(self, rows: _Rows, heads: int, number: int, weights: dict[str, int], norm: str) -> _Rows:
        """Q or K alone, normed over each head or over all of them, and with rotary positions."""
        width = heads * self._shape.head_dim
        has_rotary, after = bool(self._tensors.frequency_factors[number]), self._shape.family.norms_after_rotary
        if has_rotary and after:
            rows = _Rows(self._apply_rotary(self._heads(rows, heads), number), 0, width * ITEM_BYTES)
        if f"{norm}.weight" in weights:
            if self._shape.family.query_key_norm == "heads":
                tensor = self._heads(rows, heads)
            else:
                tensor = self._view(rows.tensor, (width, sum(self._counts)), (rows.stride,), rows.offset)
            rows = _Rows(self._operations.norm(tensor, weights, norm), 0, width * ITEM_BYTES)
        if has_rotary and not after:
            rows = _Rows(self._apply_rotary(self._heads(rows, heads), number), 0, width * ITEM_BYTES)
        return rows

    def _heads(self, rows: _Rows, heads: int) -> int:
        head_dim = self._shape.head_dim
        sizes, strides = (head_dim, heads, sum(self._counts)), (head_dim * ITEM_BYTES, rows.stride)
        return self._view(rows.tensor, sizes, strides, rows.offset)

    def _rotated(self, heads: int, number: int) -> int:
        return self._apply_rotary(heads, number) if self._tensors.frequency_factors[number] else heads

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
        key = self._slot(slots.key_data[-1], slots.key_count[-1], shape.head_dim)
        value = self._slot(slots.value_data[-1], slots.value_count[-1], shape.value_dim)
        sizes, strides = (shape.head_dim, count, shape.heads), (query.stride, shape.head_dim * ITEM_BYTES)
        own = self._view(query.tensor, sizes, strides, query.offset)
        window = shape.windows[self._start_layer + number]
        scale, cap = shape.attention_scale, shape.attention_cap
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
        return TILE_ROWS if is_tiled and self._memory.device.is_host else count

    def _slot(self, data: list[int], counts: list[int], head_dim: int) -> int:
        """K or V of one session in one layer; its address and length are written before each step."""
        shape, memory = self._shape, self._memory
        slot = memory.outside(self._call("new_tensor_3d", self._tensors.key_type, head_dim, 1, shape.kv_heads))
        at = memory.word(slot)
        memory.words[at + memory.at_strides + 1] = self._tensors.row_bytes
        memory.words[at + memory.at_strides + 2] = self._tensors.row_bytes // shape.kv_heads
        data.append(at + memory.at_data)
        counts.append(at + memory.at_sizes + 1)
        return slot


@dataclass(frozen=True, slots=True)
class _Rows:
    """Q, K or V of all tokens inside a tensor: from `offset` on, a token every `stride` bytes."""

    tensor: int
    offset: int
    stride: int

    def from_token(self, token: int) -> _Rows:
        return _Rows(self.tensor, self.offset + token * self.stride, self.stride)
