"""The model types that ggml computes, one table entry each.

Norms, biases and gates that a layer has no tensor for are left out of its computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from noodle.model.families import ROTARY_TYPES, rotary_types

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
    head: str = "lm_head"  # not in models with tied embeddings
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # added to norm weights
    query_key_norm: Literal["heads", "whole"] = "heads"  # axis of the norms of q and k, if the model has them
    interleaved: bool = False  # dimensions 2i and 2i + 1 of a head rotate together, not i and i + half
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
    # router; gate, up and down, with {} for the expert or as one tensor of all experts
    experts: Mapping[str, str] = field(default_factory=dict)
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
