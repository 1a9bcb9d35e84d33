"""A model's numbers as ggml's graphs need them, from transformers' config; knows no tensor and computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from noodle.errors import UnsupportedModel
from services.stage.executors.ggml.families import ACTIVATIONS, GGML_FAMILIES, GgmlFamily, ggml_lacks
from services.stage.executors.ggml.rotary import Rotary, rotary_of

USE_TRANSFORMERS = "Leave this model to transformers (NOODLE_EXECUTOR=transformers)."


@dataclass(frozen=True)
class ModelShape:
    """The whole model's; per-layer tuples are by the layer's number in the model."""

    family: GgmlFamily
    layer_count: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    activation: Literal["silu", "gelu_tanh", "gelu"]
    token_scale: float  # of tokens' embeddings
    input_scale: float  # of whatever enters the first layer
    residual_scale: float
    attention_scale: float
    attention_cap: float  # 0 is none
    logit_scale: float
    logit_cap: float  # 0 is none
    windows: tuple[int, ...]  # 0 is none
    rotaries: tuple[Rotary | None, ...]
    tied: bool
    maximum_positions: int
    experts: int
    experts_per_token: int
    normalised_experts: bool


def shape_of(config: Any, context_length: int) -> ModelShape:
    """From a transformers config object; raises UnsupportedModel with what `ggml_lacks` says."""
    lacking = ggml_lacks(config.to_dict())
    if lacking:
        raise UnsupportedModel(f"ggml does not compute this model: {lacking}.", cure=USE_TRANSFORMERS)
    family = GGML_FAMILIES[config.model_type]
    layer_count = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    experts = int(getattr(config, "num_local_experts", None) or 0) if family.experts else 0
    normalised = family.normalised_experts
    if family.attention_scale:
        attention_scale = float(getattr(config, family.attention_scale))
    elif family.query_scalar:
        attention_scale = float(getattr(config, family.query_scalar)) ** -0.5
    else:
        attention_scale = head_dim**-0.5 if getattr(config, "scale_attn_weights", True) else 1.0
    return ModelShape(
        family=family,
        layer_count=layer_count,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        norm_epsilon=float(_first(config, "rms_norm_eps", "norm_epsilon", "layer_norm_epsilon")),
        activation=ACTIVATIONS[str(_first(config, "hidden_activation", "hidden_act", "activation_function"))],
        token_scale=float(config.hidden_size) ** 0.5 if family.scaled_embedding else 1.0,
        input_scale=_factor(config, family.embedding_scale),
        residual_scale=_factor(config, family.residual_scale),
        attention_scale=attention_scale,
        attention_cap=_cap(config, family.attention_cap),
        logit_scale=1.0 / _factor(config, family.logit_divisor),
        logit_cap=_cap(config, family.logit_cap),
        windows=_windows(config, family, layer_count),
        rotaries=_rotaries(config, family, layer_count, head_dim, context_length),
        tied=bool(config.tie_word_embeddings),
        maximum_positions=int(config.max_position_embeddings),
        experts=experts,
        experts_per_token=int(getattr(config, "num_experts_per_tok", None) or 0) if experts else 0,
        normalised_experts=bool(getattr(config, normalised) if isinstance(normalised, str) else normalised),
    )


def _first(config: Any, *names: str) -> Any:
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


def _factor(config: Any, name: str) -> float:
    return float(getattr(config, name)) if name else 1.0


def _cap(config: Any, name: str) -> float:
    return float(getattr(config, name) or 0.0) if name else 0.0


def _windows(config: Any, family: GgmlFamily, layer_count: int) -> tuple[int, ...]:
    window = int(getattr(config, "sliding_window", None) or 0)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return (window if family.windowed else 0,) * layer_count


def _rotaries(
    config: Any, family: GgmlFamily, layer_count: int, head_dim: int, context_length: int
) -> tuple[Rotary | None, ...]:
    if family.positions:
        return (None,) * layer_count
    maximum = int(config.max_position_embeddings)
    original = int(getattr(config, "original_max_position_embeddings", None) or maximum)
    parameters = config.rope_parameters
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * layer_count
    by_type: dict[str, Rotary] = {}
    for kind in layer_types:
        if kind not in by_type:
            own = parameters.get(kind, parameters)
            by_type[kind] = rotary_of(own, head_dim, maximum, original, context_length)
    turned = getattr(config, "no_rope_layers", None) or [1] * layer_count  # 1 is a layer with rotary positions
    return tuple(by_type[kind] if turns else None for kind, turns in zip(layer_types, turned, strict=True))
