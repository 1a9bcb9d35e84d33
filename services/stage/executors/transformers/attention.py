"""Attention over a packed batch: the rows of several sessions side by side, each attending to its own KV rows alone.

Registered with transformers' attention interface under the name `noodle`; every attention module of a slice carries
the slice's StepSpans (`attach`), so that slices in one process do not meet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.stage.executors.transformers.kv_rows import SessionRows

IMPLEMENTATION = "noodle"
_ATTRIBUTE = "noodle_step_spans"


class AttentionSpan:
    """Rows [begin, end) of the packed axis belong to one session, the first of them at `first_position`."""

    __slots__ = ("begin", "end", "first_position", "masks", "rows")

    def __init__(self, rows: SessionRows, begin: int, end: int, first_position: int) -> None:
        self.rows = rows
        self.begin = begin
        self.end = end
        self.first_position = first_position
        self.masks: dict[int | None, torch.Tensor] = {}  # by window; the same for every layer of the step

    def mask(self, first_key: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Which keys from `first_key` on each of the span's rows attends to, bool [rows, keys]."""
        mask = self.masks.get(window)
        if mask is None:
            end_position = self.first_position + self.end - self.begin
            query_position = torch.arange(self.first_position, end_position, device=device)[:, None]
            key_position = torch.arange(first_key, end_position, device=device)[None]
            mask = key_position <= query_position
            if window is not None:
                mask &= key_position > query_position - window
            self.masks[window] = mask
        return mask


class StepSpans:
    """The spans of the step that a slice computes now, in the order of the packed axis; shared with its attention."""

    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: list[AttentionSpan] = []


def register() -> None:
    """Make `noodle` an attention implementation of transformers; doing it again changes nothing.

    No mask function is registered with it, and so transformers builds no mask: who attends to what is in the spans.
    """
    AttentionInterface.register(IMPLEMENTATION, packed_attention)


def attach(model: torch.nn.Module, step_spans: StepSpans) -> None:
    """Let every attention module of a model see the step in progress of its slice."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _ATTRIBUTE, step_spans)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature; always None here
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - transformers' signature; nothing drops out at inference
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Write K and V `[1, kv_heads, total_tokens, head_dim]` to their sessions' rows and attend session by session.

    Comes back as [1, total_tokens, heads, value_dim], as transformers wants it.
    """
    spans: list[AttentionSpan] = getattr(module, _ATTRIBUTE).spans
    layer: int = module.layer_idx  # type: ignore[assignment]
    if len(spans) == 1:
        return _attend(spans[0], layer, query, key, value, scaling, sliding_window, softcap, s_aux), None
    outputs = []
    for span in spans:
        tokens = span.end - span.begin
        outputs.append(
            _attend(
                span,
                layer,
                query.narrow(2, span.begin, tokens),
                key.narrow(2, span.begin, tokens),
                value.narrow(2, span.begin, tokens),
                scaling,
                sliding_window,
                softcap,
                s_aux,
            )
        )
    return torch.cat(outputs, 1), None


def _attend(
    span: AttentionSpan,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One session's rows of one layer: [1, tokens, heads, value_dim]."""
    _, heads, tokens, _ = query.shape
    first_position = span.first_position
    end_position = first_position + tokens
    keys, values = span.rows.write(layer, first_position, key, value)
    # a window that no row of the span reaches the edge of is no window; keys before all windows are left out
    if window is not None and end_position <= window:
        window = None
    first_key = 0 if window is None else max(0, first_position + 1 - window)
    keys = keys.narrow(2, first_key, end_position - first_key)
    values = values.narrow(2, first_key, end_position - first_key)
    kv_heads = keys.shape[1]
    if softcap is not None or sinks is not None:
        mask = span.mask(first_key, window, query.device) if tokens > 1 else None
        return _attend_by_hand(query, keys, values, mask, scaling, softcap, sinks)
    if tokens == 1:
        # the heads that share a KV head become rows of it: no mask and no copy of K and V is needed
        grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
        output = scaled_dot_product_attention(grouped, keys, values, scale=scaling)
        return output.reshape(1, 1, heads, -1)
    whole_prompt = first_position == 0 and window is None
    output = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if whole_prompt else span.mask(first_key, window, query.device),
        is_causal=whole_prompt,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return output.transpose(1, 2)


def _attend_by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap on its scores or with sinks, which torch's fused one does not know."""
    _, heads, tokens, head_dim = query.shape
    groups = heads // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink_scores = sinks.reshape(1, -1, 1, 1).expand(1, heads, tokens, 1).to(scores.dtype)
        scores = torch.cat([scores, sink_scores], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ values).transpose(1, 2)
