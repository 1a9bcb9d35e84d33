"""A session's rows and noodle's attention over them, a graph for each chunk of its tokens."""

from __future__ import annotations

import itertools

import numpy as np

from services.stage.executors.ggml.graph import SpanRows
from services.stage.executors.ggml.kernels.attention import BLOCK_TOKENS, LayerAttention, flash_attention_kernel
from services.stage.executors.ggml.weights import TYPE_NUMBERS
from tests.support.stages.ggml_operation import Graph


class Sessions:
    """Rows of sessions in one layer. `key` and `value` are [sessions][tokens, heads, dimensions]; V None is latent."""

    def __init__(self, ggml, kind, heads, key, value=None, *, value_dim=None, instructions=None, threads=1, fill=0):
        self.ggml, self.kind, self.heads, self.threads = ggml, kind, heads, threads
        self.key, self.value = key, value
        _, self.kv_heads, self.key_dim = key[0].shape
        self.value_dim = value_dim or (self.key_dim if value is None else value[0].shape[-1])
        self.kernel = flash_attention_kernel(
            ggml,
            TYPE_NUMBERS[kind],
            heads=heads,
            kv_heads=self.kv_heads,
            head_dim=self.key_dim,
            value_dim=self.value_dim,
            only=instructions,
        )
        row_bytes = int(ggml.ggml_row_size(TYPE_NUMBERS[kind], self.key_dim)) * self.kv_heads
        self.rows = []
        for each in key:
            tokens = -(-len(each) // BLOCK_TOKENS) * BLOCK_TOKENS
            self.rows.append(np.full((1 if value is None else 2, tokens * row_bytes), fill, np.uint8))

    def attend(self, query, spans, *, scale=0.125, cap=0.0, window=0, sinks=None):
        """Attention of spans (session, first token, end token); `query` [all of their tokens, heads, key_dim]."""
        graph = Graph(self.ggml, self.threads)
        context = graph.memory.context
        keys = np.concatenate([self.key[each][begin:end] for each, begin, end in spans])
        key, value = graph.input(np.ascontiguousarray(keys)), None
        if self.value is not None:
            values = np.concatenate([self.value[each][begin:end] for each, begin, end in spans])
            value = graph.input(np.ascontiguousarray(values))
        sink = graph.input(sinks) if sinks is not None else 0
        layer = LayerAttention(0, 0 if self.value is None else 1, scale, cap, window, sink)
        step = self.kernel.new_spans(len(spans))
        attended = self.kernel.attend(context, step, layer, query=graph.input(query), key=key, value=value)
        step.write(
            [
                SpanRows(self.rows[each].ctypes.data, 0, self.rows[each].shape[1], begin, end - begin)
                for each, begin, end in spans
            ]
        )
        return graph.compute(attended, (len(query), self.heads, self.value_dim))

    def in_chunks(self, query, cuts, **options):
        """Attention of one session's tokens from 0 on, computed in chunks that end at these tokens."""
        edges = [0, *cuts]
        parts = [
            self.attend(query[begin:end], [(0, begin, end)], **options) for begin, end in itertools.pairwise(edges)
        ]
        return np.concatenate(parts)

    def stored(self, area, session=0):
        """The numbers in K's (0) or V's (1) rows, float64 [tokens, heads, dimensions]."""
        dimensions = self.value_dim if area else self.key_dim
        blocks = len(self.rows[session][area]) // (
            int(self.ggml.ggml_row_size(TYPE_NUMBERS[self.kind], self.key_dim)) * self.kv_heads * BLOCK_TOKENS
        )
        found = self.rows[session][area].reshape(blocks, self.kv_heads, -1)
        if self.kind == "q8_0":
            groups = found.reshape(blocks, self.kv_heads, dimensions // 32, 34 * BLOCK_TOKENS)
            scales = groups[..., : 2 * BLOCK_TOKENS].copy().view(np.float16).astype(float)
            items = groups[..., 2 * BLOCK_TOKENS :].copy().view(np.int8).reshape(*groups.shape[:3], 32, 32)
            if area == 0:
                items = np.swapaxes(items, -1, -2)  # now token, dimension
            numbers = np.moveaxis(items * scales[..., None], 3, 1)
        else:
            numbers = found.copy().view({"f32": np.float32, "f16": np.float16}[self.kind]).astype(float)
            shape = (dimensions, BLOCK_TOKENS) if area == 0 else (BLOCK_TOKENS, dimensions)
            numbers = numbers.reshape(blocks, self.kv_heads, *shape)
            numbers = np.swapaxes(numbers, -1, -2) if area == 0 else numbers
            numbers = np.moveaxis(numbers, 2, 1)
        return numbers.reshape(blocks * BLOCK_TOKENS, self.kv_heads, dimensions)


def attention_by_numpy(query, key, value, *, scale=0.125, cap=0.0, window=0, sinks=None, first=0):
    """The formula in float64, for queries [tokens, heads, key_dim] from position `first` on."""
    tokens, heads, _ = query.shape
    keys, key_heads, _ = key.shape
    shared = heads // key_heads
    position = np.arange(first, first + tokens)[:, None]
    is_seen = np.arange(keys) <= position
    if window:
        is_seen &= np.arange(keys) > position - window
    found = np.empty((tokens, heads, value.shape[-1]))
    with np.errstate(all="ignore"):
        for head in range(heads):
            scores = query[:, head].astype(float) @ key[:, head // shared].astype(float).T * scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            scores[~is_seen] = -np.inf
            most = scores.max(1, keepdims=True)
            weights = np.exp(scores - most)
            total = weights.sum(1, keepdims=True)
            if sinks is not None:
                total += np.exp(float(sinks[head]) - most)
            seen = np.where(is_seen[..., None], value[:, head // shared].astype(float), 0.0)
            found[:, head] = np.einsum("tk,tkd->td", weights / total, seen)
    return found
