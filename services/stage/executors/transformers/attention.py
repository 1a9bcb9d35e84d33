"""Attention over a packed batch: rows of several sessions, each attending to its own session's KV rows.

It is registered with transformers' attention interface as `noodle`. Every attention module of a slice carries the
slice's StepSpans (`attach`), which keeps slices in one process apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.stage.executors.transformers.kv_rows import SessionRows

IMPLEMENTATION = "noodle"
_ATTRIBUTE = "noodle_step_spans"


@dataclass(eq=False, slots=True)
class AttentionSpan:
    """Rows [begin, end) of the packed axis: one session's tokens from `first_position` on."""

    rows: SessionRows
    begin: int
    end: int
    first_position: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window; shared by all layers of the step

    def mask(self, first_key: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Whether each row of the span attends to each key from `first_key` on, bool [rows, keys]."""
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


class _Options(NamedTuple):
    """What transformers passes to the attention of a layer."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(eq=False, slots=True)
class StepSpans:
    """The spans of a slice's current step, in the order of the packed axis; shared with its attention modules."""

    spans: list[AttentionSpan] = field(default_factory=list)


def register() -> None:
    """Register `noodle` as an attention implementation of transformers. Idempotent.

    Without a registered mask function transformers builds no mask: the spans tell what each row attends to.
    """
    AttentionInterface.register(IMPLEMENTATION, packed_attention)


def attach(model: torch.nn.Module, step_spans: StepSpans) -> None:
    """Give every attention module of a model its slice's current step."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _ATTRIBUTE, step_spans)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature, always None
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - transformers' signature
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Write K and V `[1, kv_heads, total_tokens, head_dim]` to their sessions' rows and attend session by session.

    Returns [1, total_tokens, heads, value_dim].
    """
    spans: list[AttentionSpan] = getattr(module, _ATTRIBUTE).spans
    layer: int = module.layer_idx  # type: ignore[assignment]
    options = _Options(scaling, sliding_window or _masked_window(module), softcap, s_aux)
    outputs = []
    for span in spans:
        own_query, own_key, own_value = query, key, value
        if len(spans) > 1:
            tokens = span.end - span.begin
            own_query, own_key, own_value = (each.narrow(2, span.begin, tokens) for each in (query, key, value))
        keys, values = span.rows.write(layer, span.first_position, own_key, own_value)
        outputs.append(_attend(span, own_query, keys, values, options))
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]), None


def _masked_window(module: torch.nn.Module) -> int | None:
    """The window of a layer whose family puts it in the mask, and does not pass it to its attention."""
    config: Any = module.config
    if config.model_type == "phimoe":
        return config.sliding_window  # type: ignore[no-any-return]
    return getattr(module, "sliding_window", None) if config.model_type == "qwen2_moe" else None


def _attend(
    span: AttentionSpan, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: _Options
) -> torch.Tensor:
    """One session's rows of one layer: [1, tokens, heads, value_dim]."""
    _, heads, tokens, _ = query.shape
    first_position = span.first_position
    end_position = first_position + tokens
    # a window that covers all keys is no window; keys before all windows are left out
    window = options.window
    if window is not None and end_position <= window:
        window = None
    first_key = 0 if window is None else max(0, first_position + 1 - window)
    keys = keys.narrow(2, first_key, end_position - first_key)
    values = values.narrow(2, first_key, end_position - first_key)
    kv_heads = keys.shape[1]
    if options.softcap is not None or options.sinks is not None:
        mask = span.mask(first_key, window, query.device) if tokens > 1 else None
        return _attend_unfused(query, keys, values, mask, options)
    if tokens == 1:
        # heads that share a KV head become its rows, which needs no mask and no copy of K and V
        grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
        output = scaled_dot_product_attention(grouped, keys, values, scale=options.scaling)
        return output.reshape(1, 1, heads, -1)
    whole_prompt = first_position == 0 and window is None
    output = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if whole_prompt else span.mask(first_key, window, query.device),
        is_causal=whole_prompt,
        scale=options.scaling,
        enable_gqa=heads != kv_heads,
    )
    return output.transpose(1, 2)


def _attend_unfused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """Attention with a soft cap on its scores or with sinks, which torch's fused attention lacks."""
    scaling, softcap, sinks = options.scaling, options.softcap, options.sinks
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
