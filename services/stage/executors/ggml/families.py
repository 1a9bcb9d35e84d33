"""The model types that ggml computes, one table entry each, and a model's dimensions read from its config.

Norms, biases and gates that a layer has no tensor for are left out of its computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from noodle.errors import UnsupportedModel
from noodle.model.families import ROTARY_TYPES, rotary_types
from services.stage.executors.ggml.rotary import Rotary, rotary_of

Activation = Literal["silu", "gelu_tanh", "gelu"]
USE_TRANSFORMERS = "Leave this model to transformers (NOODLE_EXECUTOR=transformers)."

# name of a module here -> its key below the layer, without .weight or .bias
LLAMA_MODULES: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
POST_NORMS: Mapping[str, str] = {
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class GgmlFamily:
    """What is particular about a model type, beside the values in its config."""

    modules: Mapping[str, str] = field(default_factory=lambda: LLAMA_MODULES)
    layer: str = "model.layers.{}."
    embedding: str = "model.embed_tokens"
    positions: str = ""  # learned, added to the embeddings
    final_norm: str = "model.norm"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # added to norm weights
    query_key_norm: Literal["heads", "whole"] = "heads"  # axis of the norms of q and k, if the model has them
    transposed: bool = False  # matrices are stored [in, out]
    windowed: bool = False  # config.sliding_window applies to every layer if the config lists no layer types
    scaled_embedding: bool = False  # token embeddings times the square root of the hidden size
    # keys of the config, empty if the family has no such value
    embedding_scale: str = ""  # factor of the first layer's input
    residual_scale: str = ""
    attention_scale: str = ""  # factor of q·k, instead of head_dim ** -0.5
    query_scalar: str = ""  # value whose ** -0.5 is that factor
    attention_cap: str = ""  # soft cap of q·k; 0 or None is no cap
    logit_divisor: str = ""
    logit_cap: str = ""
    experts: Mapping[str, str] = field(default_factory=dict)  # router; gate, up and down with {} for the expert
    normalised_experts: bool | str = False  # whether the weights of the chosen experts are scaled to sum to 1


GEMMA = GgmlFamily(
    modules={**LLAMA_MODULES, **POST_NORMS, "feed_forward_norm": "pre_feedforward_layernorm"},
    norm_offset=1.0,
    scaled_embedding=True,
    query_scalar="query_pre_attn_scalar",
    logit_cap="final_logit_softcapping",
)

GGML_FAMILIES: Mapping[str, GgmlFamily] = {
    "gemma2": replace(GEMMA, attention_cap="attn_logit_softcapping"),
    "gemma3_text": GEMMA,  # transformers reads a soft cap of q·k, but does not apply it
    "gpt2": GgmlFamily(
        modules={
            "attention_norm": "ln_1",
            "query_key_value": "attn.c_attn",
            "output": "attn.c_proj",
            "feed_forward_norm": "ln_2",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        layer="transformer.h.{}.",
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        norm="layer",
        transposed=True,
    ),
    "granite": GgmlFamily(
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        attention_scale="attention_multiplier",
        logit_divisor="logits_scaling",
    ),
    "llama": GgmlFamily(),
    "mistral": GgmlFamily(windowed=True),
    "mixtral": GgmlFamily(
        windowed=True,
        experts={
            "router": "block_sparse_moe.gate",
            "gate": "block_sparse_moe.experts.{}.w1",
            "up": "block_sparse_moe.experts.{}.w3",
            "down": "block_sparse_moe.experts.{}.w2",
        },
        normalised_experts=True,
    ),
    "olmo2": GgmlFamily(
        modules={
            **{name: key for name, key in LLAMA_MODULES.items() if not name.endswith(("attention_norm", "ward_norm"))},
            **POST_NORMS,
        },
        query_key_norm="whole",
    ),
    "phi3": GgmlFamily(
        modules={**LLAMA_MODULES, "query_key_value": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        windowed=True,
    ),
    "qwen2": GgmlFamily(),
    "qwen3": GgmlFamily(),
    "qwen3_moe": GgmlFamily(
        experts={
            "router": "mlp.gate",
            "gate": "mlp.experts.{}.gate_proj",
            "up": "mlp.experts.{}.up_proj",
            "down": "mlp.experts.{}.down_proj",
        },
        normalised_experts="norm_topk_prob",
    ),
    "smollm3": GgmlFamily(),
    "starcoder2": GgmlFamily(
        modules={**LLAMA_MODULES, "up": "mlp.c_fc", "down": "mlp.c_proj"}, norm="layer", windowed=True
    ),
}

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def ggml_lacks(config: Mapping[str, Any]) -> str:
    """Reason why ggml does not compute the model of this config.json, as part of a sentence; empty if it does."""
    model_type = str(config.get("model_type") or "unnamed")
    if model_type not in GGML_FAMILIES:
        return f"models of type {model_type} are computed by transformers alone"
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        activation = config.get(name)
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            return f"its activation {activation} is computed by transformers alone"
    for kind in rotary_types(config):
        if kind not in ROTARY_TYPES:
            return f"its rotary scaling {kind} is computed by transformers alone"
    if config.get("use_bidirectional_attention"):
        return "it attends to later tokens too"
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        return "its attention is scaled by layer or crosses to another model, which transformers alone computes"
    return ""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions and factors of the whole model; per-layer tuples are indexed by the layer's number in the model."""

    family: GgmlFamily
    layer_count: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    activation: Activation
    token_scale: float  # factor of token embeddings
    input_scale: float  # factor of the first layer's input
    residual_scale: float
    attention_scale: float
    attention_cap: float  # 0 means none
    logit_scale: float
    logit_cap: float  # 0 means none
    windows: tuple[int, ...]  # 0 means none
    rotaries: tuple[Rotary | None, ...]
    tied: bool
    maximum_positions: int
    experts: int
    experts_per_token: int
    normalised_experts: bool


def shape_of(config: Any, context_length: int) -> ModelShape:
    """Read the dimensions from a transformers config object; raises UnsupportedModel if ggml lacks something."""
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
            by_type[kind] = rotary_of(parameters.get(kind, parameters), head_dim, maximum, original, context_length)
    has_rotary = getattr(config, "no_rope_layers", None) or [1] * layer_count  # 1 is a layer with rotary positions
    return tuple(by_type[kind] if rotary else None for kind, rotary in zip(layer_types, has_rotary, strict=True))
