"""The architectures of GGUF files: one table row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# keys of config.json here that belong into rope_parameters
TEMPERATURE_SCALE, YARN_MULTIPLIER = "llama_4_scaling_beta", "mscale_all_dim"
SOFTMAX_GATING, SIGMOID_GATING = 1, 2  # values of expert_gating_func
LATENT_KEYS = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length_mla": "qk_head_dim",
    "attention.value_length_mla": "v_head_dim",
}
ROUTER_KEYS = {
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
DEEPSEEK_KEYS = {**ROUTER_KEYS, "rope.scaling.yarn_log_multiplier": "yarn_multiplier"}
GRANITE_KEYS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture stands for."""

    model_type: str
    moe_model_type: str = ""  # if the file has experts; empty: then it is refused
    keys: Mapping[str, str] = field(default_factory=dict)  # further keys -> names in config.json
    by_layer: Mapping[str, str] = field(default_factory=dict)  # keys without prefix, of a number for each layer
    values: Mapping[str, Any] = field(default_factory=dict)  # what the architecture implies, unless a key says it
    gatings: tuple[int, ...] = (SOFTMAX_GATING,)  # what the router's function may be, if the file says it
    epsilon: str = "rms_norm_eps"
    interleaved: bool = False  # dimensions 2i and 2i + 1 of a head rotate together
    windowed: bool = False  # a sliding window applies to all layers
    window_pattern: int = 0  # or every n-th layer attends to all tokens, unless the file says which
    latent: bool = False  # K and V are products with one latent vector
    rotary: Mapping[str, Any] = field(default_factory=dict)  # further rope_parameters
    local_theta: float = 0.0  # rotary base of layers with a window; 0: the same as of the others


ARCHITECTURES: Mapping[str, Architecture] = {
    "apertus": Architecture(
        "apertus", by_layer={f"xielu.{name}": f"xielu_{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")}
    ),
    "arcee": Architecture("arcee", interleaved=True),
    "cohere2": Architecture(
        "cohere2", keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved=True, window_pattern=4
    ),
    "command-r": Architecture(
        "cohere", keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved=True
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        moe_model_type="deepseek_v2",
        keys={**LATENT_KEYS, **DEEPSEEK_KEYS},
        values={"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        gatings=(SOFTMAX_GATING, SIGMOID_GATING),
        interleaved=True,
        latent=True,
    ),
    "glm4": Architecture("glm4", interleaved=True),
    "gpt-oss": Architecture("gpt_oss", moe_model_type="gpt_oss", window_pattern=2, rotary={"truncate": False}),
    "gptneox": Architecture(
        "gpt_neox", keys={"use_parallel_residual": "use_parallel_residual"}, epsilon="layer_norm_eps"
    ),
    "minicpm3": Architecture("minicpm3", keys=LATENT_KEYS, latent=True),
    "phi2": Architecture("phi", epsilon="layer_norm_eps"),
    "stablelm": Architecture(
        "stablelm", keys={"use_parallel_residual": "use_parallel_residual"}, epsilon="layer_norm_eps"
    ),
    # of the first models of this name; later ones with another activation have a fork's type of tensor
    "bitnet": Architecture("bitnet", values={"hidden_act": "silu"}),
    "ernie4_5": Architecture("ernie4_5", interleaved=True),
    "ernie4_5-moe": Architecture("ernie4_5_moe", moe_model_type="ernie4_5_moe", interleaved=True),
    "exaone4": Architecture("exaone4", window_pattern=4),
    "gemma": Architecture("gemma"),
    "glm4moe": Architecture(
        "glm4_moe",
        moe_model_type="glm4_moe",
        keys=ROUTER_KEYS,
        gatings=(SIGMOID_GATING,),
    ),
    "gemma2": Architecture(
        "gemma2",
        keys={"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        values={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        window_pattern=2,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        keys={"final_logit_softcapping": "final_logit_softcapping"},
        values={"final_logit_softcapping": None},
        window_pattern=6,
        local_theta=10_000.0,
    ),
    "gpt2": Architecture("gpt2", epsilon="layer_norm_epsilon"),
    "granite": Architecture(
        "granite",
        moe_model_type="granitemoeshared",
        keys=GRANITE_KEYS,
        interleaved=True,
    ),
    "granitemoe": Architecture("granite", moe_model_type="granitemoeshared", keys=GRANITE_KEYS, interleaved=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "hunyuan-moe": Architecture("hunyuan_v1_moe", moe_model_type="hunyuan_v1_moe"),
    "llama": Architecture("llama", moe_model_type="mixtral", interleaved=True, windowed=True),
    "minicpm": Architecture(
        "granite",
        keys=GRANITE_KEYS,
        values={"embedding_multiplier": None, "residual_multiplier": None, "logits_scaling": None},
        interleaved=True,
    ),
    "mistral3": Architecture(
        "ministral3",
        keys={"attention.temperature_scale": TEMPERATURE_SCALE, "rope.scaling.yarn_log_multiplier": YARN_MULTIPLIER},
        interleaved=True,
    ),
    "nemotron": Architecture("nemotron", epsilon="norm_eps"),
    "olmo2": Architecture("olmo2"),
    "olmoe": Architecture("olmoe", moe_model_type="olmoe", values={"norm_topk_prob": False}),
    "phi3": Architecture("phi3", windowed=True),
    "phimoe": Architecture("phimoe", moe_model_type="phimoe", windowed=True),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", moe_model_type="qwen2_moe", values={"norm_topk_prob": False}),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", moe_model_type="qwen3_moe", values={"norm_topk_prob": True}),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "starcoder2": Architecture("starcoder2", epsilon="norm_epsilon", windowed=True),
}
# families whose larger models divide q·k by other than the head's size: layers -> that size, from hidden size and heads
QUERY_SCALARS: Mapping[str, int] = {"gemma2": 46, "gemma3_text": 62}
# why known architectures are not in the table
REASONS: Mapping[str, str] = {
    "bitnet-b1.58": "its matrices have a type of a fork, and no public converter writes another",
    "llama4": "its layers attend within chunks of tokens, which no layer here does",
}
