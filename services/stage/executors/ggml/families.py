"""The model types that ggml computes, one table entry each.

Norms, biases and gates that a layer has no tensor for are left out of its computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from noodle.model.families import ROTARY_TYPES, rotary_types

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "xielu"]
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
LATENT_MODULES: Mapping[str, str] = {
    **{name: key for name, key in LLAMA_MODULES.items() if name not in ("key", "value", "query_norm", "key_norm")},
    "query_latent": "self_attn.q_a_proj",
    "query_latent_norm": "self_attn.q_a_layernorm",
    "query_of_latent": "self_attn.q_b_proj",
    "latent": "self_attn.kv_a_proj_with_mqa",
    "latent_norm": "self_attn.kv_a_layernorm",
    "key_value_of_latent": "self_attn.kv_b_proj",
}
POST_NORM_MODULES: Mapping[str, str] = {
    **{name: key for name, key in LLAMA_MODULES.items() if name not in ("attention_norm", "feed_forward_norm")},
    **POST_NORMS,
}


@dataclass(frozen=True, slots=True)
class ExpertFamily:
    """How a family's router chooses experts. Further strings are keys of the config, empty if it has no such value."""

    # router; gate, up and down, with {} for the expert or as one tensor of all experts; gate_up; shared_gate, shared_up
    # and shared_down or shared_gate_up of the expert that every token passes; shared_router
    modules: Mapping[str, str]
    # of the router's outputs: of all experts, each alone, of the chosen ones, or as in phimoe
    scores: Literal["softmax", "sigmoid", "chosen_softmax", "sparse_mixer"] = "softmax"
    correction: str = ""  # tensor that is added to the scores for the choice, not for the shares
    normalised: bool | str = False  # whether the shares of the chosen experts are scaled to sum to 1
    smallest_sum: str = ""  # of shares, by which these are divided
    share_scale: str = ""
    groups: str = ""  # number of groups of experts
    chosen_groups: str = ""  # of which alone experts are chosen
    group_best: int = 2  # experts whose scores a group is judged by
    jitter: str = ""  # of sparse_mixer
    # gate_up and down are tensors of all experts, [in, out] with gate and up in turns, whose names end without .weight
    alternating: bool = False
    steepness: str = ""  # of the gate's activation, and the limit that gate and up are clamped to
    limit: str = ""


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
    norms_after_rotary: bool = False  # q and k are normed after their rotary positions
    rotary_in_windows: bool = False  # if the model has a window, layers without one have no rotary positions
    joined_heads: bool = False  # the fused q, k and v are stored head by head: q, k and v of the first one, and so on
    transposed: bool = False  # matrices are stored [in, out]
    # attention and feed-forward part both start from the layer's input; the key of the config that says so
    parallel: bool | str = False
    windowed: bool = False  # config.sliding_window applies to every layer if the config lists no layer types
    latent: bool = False  # K and V of all heads are products with one latent vector, which is kept in their place
    # token embeddings are scaled by the square root of the hidden size, or by the value of a key of the config
    scaled_embedding: bool | str = False
    # keys of the config, empty if the family has no such value
    embedding_scale: str = ""  # factor of the first layer's input
    residual_scale: str = ""
    depth_scale: str = ""  # value that divided by the square root of the layer count is that factor
    attention_scale: str = ""  # factor of q·k, instead of head_dim ** -0.5
    query_scalar: str = ""  # value whose ** -0.5 is that factor
    attention_cap: str = ""  # soft cap of q·k; 0 or None is no cap
    logit_divisor: str = ""
    logit_factor: str = ""
    logit_width: str = ""  # value that divided by the hidden size is that factor
    logit_cap: str = ""
    experts: ExpertFamily | None = None
    activation_values: tuple[str, ...] = ()  # tensors of a layer with the numbers of its activation
    gguf_modules: Mapping[str, str] = field(default_factory=dict)  # names in GGUF files that differ from most families'


MIXTRAL_EXPERTS: Mapping[str, str] = {
    "router": "block_sparse_moe.gate",
    "gate": "block_sparse_moe.experts.{}.w1",
    "up": "block_sparse_moe.experts.{}.w3",
    "down": "block_sparse_moe.experts.{}.w2",
}
QWEN_EXPERTS: Mapping[str, str] = {
    "router": "mlp.gate",
    "gate": "mlp.experts.{}.gate_proj",
    "up": "mlp.experts.{}.up_proj",
    "down": "mlp.experts.{}.down_proj",
}
GRANITE_EXPERTS: Mapping[str, str] = {
    "router": "block_sparse_moe.router.layer",
    "gate_up": "block_sparse_moe.input_linear",
    "down": "block_sparse_moe.output_linear",
}


def shared_expert(prefix: str) -> Mapping[str, str]:
    """The modules of an expert that every token passes, with the usual names below `prefix`."""
    return {f"shared_{name}": f"{prefix}{name}_proj" for name in ("gate", "up", "down")}


GEMMA = GgmlFamily(
    modules={**LLAMA_MODULES, **POST_NORMS, "feed_forward_norm": "pre_feedforward_layernorm"},
    norm_offset=1.0,
    scaled_embedding=True,
    query_scalar="query_pre_attn_scalar",
    logit_cap="final_logit_softcapping",
)

DEEPSEEK_EXPERTS = ExpertFamily(
    {**QWEN_EXPERTS, **shared_expert("mlp.shared_experts.")},
    share_scale="routed_scaling_factor",
    groups="n_group",
    chosen_groups="topk_group",
)
GRANITE = GgmlFamily(
    embedding_scale="embedding_multiplier",
    residual_scale="residual_multiplier",
    attention_scale="attention_multiplier",
    logit_divisor="logits_scaling",
)
HUNYUAN = GgmlFamily(
    modules={**LLAMA_MODULES, "query_norm": "self_attn.query_layernorm", "key_norm": "self_attn.key_layernorm"},
    norms_after_rotary=True,
)

COHERE = GgmlFamily(
    modules={name: key for name, key in LLAMA_MODULES.items() if name != "feed_forward_norm"},
    norm="layer",
    interleaved=True,
    parallel=True,
    logit_factor="logit_scale",
)

GGML_FAMILIES: Mapping[str, GgmlFamily] = {
    "apertus": GgmlFamily(
        modules={
            **LLAMA_MODULES,
            "attention_norm": "attention_layernorm",
            "feed_forward_norm": "feedforward_layernorm",
        },
        activation_values=tuple(f"mlp.act_fn.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")),
    ),
    "arcee": GgmlFamily(),
    "bitnet": GgmlFamily(
        modules={
            **LLAMA_MODULES,
            "attention_inner_norm": "self_attn.attn_sub_norm",
            "feed_forward_inner_norm": "mlp.ffn_sub_norm",
        }
    ),
    "cohere": COHERE,
    "cohere2": replace(COHERE, rotary_in_windows=True),
    "deepseek_v2": GgmlFamily(
        modules=LATENT_MODULES, latent=True, interleaved=True, experts=replace(DEEPSEEK_EXPERTS, group_best=1)
    ),
    "deepseek_v3": GgmlFamily(
        modules=LATENT_MODULES,
        latent=True,
        interleaved=True,
        experts=replace(
            DEEPSEEK_EXPERTS,
            scores="sigmoid",
            correction="mlp.gate.e_score_correction_bias",
            normalised="norm_topk_prob",
        ),
    ),
    "ernie4_5": GgmlFamily(interleaved=True),
    "ernie4_5_moe": GgmlFamily(
        interleaved=True,
        experts=ExpertFamily(
            {**QWEN_EXPERTS, **shared_expert("mlp.shared_experts.")},
            correction="mlp.moe_statics.e_score_correction_bias",
            normalised=True,
            smallest_sum="moe_norm_min",
        ),
    ),
    "exaone4": GgmlFamily(modules=POST_NORM_MODULES, rotary_in_windows=True),
    "gemma": GgmlFamily(norm_offset=1.0, scaled_embedding=True),
    "gemma2": replace(GEMMA, attention_cap="attn_logit_softcapping"),
    "gemma3_text": GEMMA,  # transformers reads a soft cap of q·k, but does not apply it
    "glm4": GgmlFamily(
        modules={
            **LLAMA_MODULES,
            "attention_post_norm": "post_self_attn_layernorm",
            "gate_up": "mlp.gate_up_proj",
            "feed_forward_post_norm": "post_mlp_layernorm",
        },
        interleaved=True,
    ),
    "glm4_moe": GgmlFamily(
        experts=ExpertFamily(
            {**QWEN_EXPERTS, **shared_expert("mlp.shared_experts.")},
            scores="sigmoid",
            correction="mlp.gate.e_score_correction_bias",
            normalised="norm_topk_prob",
            share_scale="routed_scaling_factor",
            groups="n_group",
            chosen_groups="topk_group",
        ),
        gguf_modules={"feed_forward_norm": "post_attention_norm"},
    ),
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
    "gpt_neox": GgmlFamily(
        modules={
            "attention_norm": "input_layernorm",
            "query_key_value": "attention.query_key_value",
            "output": "attention.dense",
            "feed_forward_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        layer="gpt_neox.layers.{}.",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        norm="layer",
        joined_heads=True,
        parallel="use_parallel_residual",
    ),
    "gpt_oss": GgmlFamily(
        modules={**LLAMA_MODULES, "sinks": "self_attn.sinks"},
        experts=ExpertFamily(
            {"router": "mlp.router", "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
            scores="chosen_softmax",
            alternating=True,
            steepness="swiglu_alpha",
            limit="swiglu_limit",
        ),
        gguf_modules={"feed_forward_norm": "post_attention_norm"},
    ),
    "granite": GRANITE,
    "granitemoe": replace(GRANITE, experts=ExpertFamily(GRANITE_EXPERTS, scores="chosen_softmax")),
    "granitemoeshared": replace(
        GRANITE,
        experts=ExpertFamily(
            {
                **GRANITE_EXPERTS,
                "shared_gate_up": "shared_mlp.input_linear",
                "shared_down": "shared_mlp.output_linear",
            },
            scores="chosen_softmax",
        ),
    ),
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": replace(
        HUNYUAN,
        experts=ExpertFamily(
            {**QWEN_EXPERTS, **shared_expert("mlp.shared_mlp."), "router": "mlp.gate.wg"}, normalised=True
        ),
    ),
    "llama": GgmlFamily(),
    "minicpm3": GgmlFamily(
        modules=LATENT_MODULES,
        latent=True,
        scaled_embedding="scale_emb",
        depth_scale="scale_depth",
        logit_width="dim_model_base",
    ),
    "ministral": GgmlFamily(windowed=True),
    "ministral3": GgmlFamily(windowed=True),
    "mistral": GgmlFamily(windowed=True),
    "mixtral": GgmlFamily(
        windowed=True,
        experts=ExpertFamily(MIXTRAL_EXPERTS, normalised=True),
    ),
    "nemotron": GgmlFamily(norm="layer", norm_offset=1.0),
    "olmo2": GgmlFamily(modules=POST_NORM_MODULES, query_key_norm="whole"),
    "olmoe": GgmlFamily(query_key_norm="whole", experts=ExpertFamily(QWEN_EXPERTS, normalised="norm_topk_prob")),
    "phi": GgmlFamily(
        modules={
            **{name: key for name, key in LLAMA_MODULES.items() if name not in ("feed_forward_norm", "gate")},
            "query_norm": "self_attn.q_layernorm",
            "key_norm": "self_attn.k_layernorm",
            "output": "self_attn.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        final_norm="model.final_layernorm",
        norm="layer",
        parallel=True,
    ),
    "phi3": GgmlFamily(
        modules={**LLAMA_MODULES, "query_key_value": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        windowed=True,
    ),
    "phimoe": GgmlFamily(
        norm="layer",
        windowed=True,
        experts=ExpertFamily(MIXTRAL_EXPERTS, scores="sparse_mixer", jitter="router_jitter_noise"),
    ),
    "qwen2": GgmlFamily(),
    "qwen3": GgmlFamily(),
    "qwen2_moe": GgmlFamily(
        experts=ExpertFamily(
            {**QWEN_EXPERTS, **shared_expert("mlp.shared_expert."), "shared_router": "mlp.shared_expert_gate"},
            normalised="norm_topk_prob",
        )
    ),
    "qwen3_moe": GgmlFamily(experts=ExpertFamily(QWEN_EXPERTS, normalised="norm_topk_prob")),
    "seed_oss": GgmlFamily(gguf_modules={"feed_forward_norm": "post_attention_norm"}),
    "smollm3": GgmlFamily(),
    "stablelm": GgmlFamily(
        modules={
            **LLAMA_MODULES,
            "query_norm": "self_attn.q_layernorm.norms.{}",
            "key_norm": "self_attn.k_layernorm.norms.{}",
        },
        norm="layer",
        parallel="use_parallel_residual",
    ),
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
    "relu2": "relu2",
    "xielu": "xielu",
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
    if config.get("clip_qkv"):
        return "its queries and keys are clipped, which transformers alone computes"
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        return "its attention is scaled by layer or crosses to another model, which transformers alone computes"
    return ""
