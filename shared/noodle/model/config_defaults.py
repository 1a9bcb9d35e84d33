"""Completes a config.json with the values that transformers' config classes fill in, without importing them.

A family is one row of DEFAULTS, under transformers' names; values that follow from other values are derived below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noodle.errors import UnsupportedModel

# other names of the same value
ALIASES: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
    "moe_num_experts": "num_local_experts",
    "moe_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function")
# far above any known model; a larger number means a broken file, and would cause an allocation of that size
MAXIMA: Mapping[str, int] = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 20,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 30,
}
SCALED_ROTARY = ("llama3", "yarn", "longrope")  # types that stretch an original length
FULL, SLIDING = "full_attention", "sliding_attention"

LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
QWEN: Mapping[str, Any] = {
    **LLAMA,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
GEMMA: Mapping[str, Any] = {
    **LLAMA,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

GRANITE: Mapping[str, Any] = {
    **LLAMA,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
HUNYUAN: Mapping[str, Any] = {**LLAMA, "vocab_size": 290943, "rms_norm_eps": 1e-5}
ERNIE: Mapping[str, Any] = {
    **LLAMA,
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
COHERE: Mapping[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
    "vocab_size": 256000,
    "hidden_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "apertus": {
        **LLAMA,
        "vocab_size": 131072,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 12_000_000.0,
    },
    "arcee": {
        **LLAMA,
        "hidden_size": 2560,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "bitnet": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2560,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    },
    "cohere": {**COHERE, "rope_theta": 500_000.0},
    "cohere2": {**COHERE, "sliding_window": 4096, "sliding_window_pattern": 4},
    "ernie4_5": {
        **ERNIE,
        "hidden_size": 1024,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "ernie4_5_moe": {
        **ERNIE,
        "hidden_size": 2560,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "moe_norm_min": 1e-12,
    },
    "exaone4": {
        **LLAMA,
        "vocab_size": 102400,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "gemma": {
        **LLAMA,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        **GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    "glm4": {
        **LLAMA,
        "vocab_size": 151552,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
    },
    "gpt2": {
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "activation_function": "gelu_new",
        "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
    },
    "glm4_moe": {
        **LLAMA,
        "vocab_size": 151552,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    "granite": GRANITE,
    "granitemoe": {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoeshared": {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": {**HUNYUAN, "num_local_experts": 1, "num_experts_per_tok": 1},
    "llama": LLAMA,
    "minicpm3": {
        **LLAMA,
        "vocab_size": 73448,
        "hidden_size": 2560,
        "num_hidden_layers": 62,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": None,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    "ministral": {
        **LLAMA,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "ministral3": {
        **LLAMA,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
    },
    "mistral": {**LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {
        **LLAMA,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    "nemotron": {
        **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
        "vocab_size": 256000,
        "hidden_size": 6144,
        "num_attention_heads": 48,
        "head_dim": 128,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "olmo2": {**LLAMA, "vocab_size": 50304, "rms_norm_eps": 1e-5},
    "olmoe": {
        **LLAMA,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "phi": {
        **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
        "vocab_size": 51200,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "phi3": {
        **LLAMA,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "phimoe": {
        **LLAMA,
        "vocab_size": 32064,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
    },
    "qwen2": {**QWEN, "max_window_layers": 28},
    "qwen2_moe": {
        **QWEN,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    "qwen3": {**QWEN, "head_dim": 128, "max_window_layers": 28},
    "qwen3_moe": {
        **QWEN,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
        "norm_topk_prob": False,
    },
    "seed_oss": {
        **LLAMA,
        "vocab_size": 155136,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
    },
    "smollm3": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
    },
    "stablelm": {
        **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
        "vocab_size": 50304,
        "hidden_size": 2560,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "partial_rotary_factor": 0.25,
    },
    "starcoder2": {
        **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
        "vocab_size": 49152,
        "hidden_size": 3072,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": None,
    },
}


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with every value that its model type has a default or a rule for; other keys stay as they are.

    The activation is under `hidden_act`. `rope_parameters` replaces the older spellings; it is one mapping, or one for
    each type of layer. Raises UnsupportedModel for values of the wrong kind.
    """
    model_type = str(config.get("model_type") or "")
    defaults = DEFAULTS.get(model_type, {})
    given = dict(config)
    for alias, name in ALIASES.items():
        if name not in given and alias in given:
            given[name] = given[alias]
    own_activation = next((given[name] for name in ACTIVATION_NAMES if name in defaults and given.get(name)), None)
    whole = {**defaults, **given}
    whole["hidden_act"] = own_activation or _first(defaults, ACTIVATION_NAMES) or _first(given, ACTIVATION_NAMES)
    try:
        _check_sizes(whole, model_type)
        if whole.get("num_key_value_heads") is None:
            whole["num_key_value_heads"] = whole["num_attention_heads"]
        if whole.get("head_dim") is None:
            whole["head_dim"] = int(whole["hidden_size"]) // int(whole["num_attention_heads"])
        if "v_head_dim" in whole and whole["v_head_dim"] is None:
            whole["v_head_dim"] = int(whole["hidden_size"]) // int(whole["num_attention_heads"])
        if "use_sliding_window" in defaults and not whole["use_sliding_window"]:
            whole["sliding_window"] = None
        whole["layer_types"] = _layer_types(whole)
        if "layer_norm_epsilon" not in defaults:  # learned positions have no rotary parameters
            whole["rope_parameters"] = _rope_parameters(whole, given, model_type)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UnsupportedModel(
            f"the config of this {model_type or 'unnamed'} model has a missing or malformed value "
            f"({type(error).__name__}: {error}).",
            cure="Fetch the model again.",
        ) from error
    return whole


def _check_sizes(whole: Mapping[str, Any], model_type: str) -> None:
    for name, maximum in MAXIMA.items():
        value = whole.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum):
            raise UnsupportedModel(
                f"the config of this {model_type or 'unnamed'} model says {name} {value!r}, which is not a number from "
                f"1 to {maximum}.",
                cure="Fetch the model again.",
            )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _layer_types(whole: dict[str, Any]) -> list[str]:
    """The type of each layer's attention; empty if the model's sliding window applies to all or none of them."""
    count = int(whole["num_hidden_layers"])
    if "no_rope_layer_interval" in whole and whole.get("no_rope_layers") is None:
        interval = int(whole["no_rope_layer_interval"])
        whole["no_rope_layers"] = [int((number + 1) % interval != 0) for number in range(count)]
    if whole.get("layer_types"):
        return list(whole["layer_types"])
    window = whole.get("sliding_window")
    if "no_rope_layer_interval" in whole:
        slides = whole.get("use_sliding_window") and window is not None
        return [SLIDING if slides and not rotary else FULL for rotary in whole["no_rope_layers"]]
    if "sliding_window_pattern" in whole:
        if window is None:
            return [FULL] * count
        pattern = int(whole["sliding_window_pattern"])
        return [SLIDING if (number + 1) % pattern else FULL for number in range(count)]
    if "max_window_layers" in whole:
        first = int(whole["max_window_layers"])
        return [SLIDING if window is not None and number >= first else FULL for number in range(count)]
    return []


def _rope_parameters(whole: dict[str, Any], given: dict[str, Any], model_type: str) -> dict[str, Any]:
    stated = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    nested = [kind for kind in stated if kind in (FULL, SLIDING)]
    if "rope_local_base_freq" in whole:
        scaling = stated if not nested else {}
        parameters = {FULL: dict(stated.get(FULL) or scaling), SLIDING: dict(stated.get(SLIDING) or {})}
        parameters[FULL].setdefault("rope_theta", whole["rope_theta"])
        parameters[SLIDING].setdefault("rope_theta", whole["rope_local_base_freq"])
        return {kind: _standard(each, whole, model_type) for kind, each in parameters.items()}
    if nested:
        return {kind: _standard(dict(stated[kind]), whole, model_type) for kind in nested if stated[kind]}
    return _standard(stated, whole, model_type)


def _standard(parameters: dict[str, Any], whole: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """One mapping of parameters with transformers' spelling and defaults."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if model_type == "phi3" and kind in ("su", "yarn"):  # names of longrope in Phi-3's first configs
        kind = "longrope"
    parameters["rope_type"] = kind
    parameters.setdefault("rope_theta", whole.get("rope_theta", 10_000.0))
    if whole.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", whole["partial_rotary_factor"])
    if kind in SCALED_ROTARY:
        if whole.get("original_max_position_embeddings") is not None:
            parameters["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
        else:
            parameters.setdefault("original_max_position_embeddings", whole["max_position_embeddings"])
    return parameters
