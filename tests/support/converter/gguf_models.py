"""Tiny models whose rows are whole blocks of every ggml type, as folders that the converter takes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.converter.converter import convert
from tests.support.models.tiny_model import LAYER_COUNT, make_tiny_model

VOCAB_SIZE = 300  # all of them in the tokenizer: some converters leave further rows out
# K-quants have blocks of 256 values
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "head_dim": 64,
}
GGUF_FAMILIES = (
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe",
    "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "granitemoe", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "minicpm", "minicpm3",
    "ministral3",
    "mistral", "mixtral", "nemotron", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
MINISTRAL_ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
PHI_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
# config attributes of a family, as its published models have them
OF_FAMILY: dict[str, dict[str, Any]] = {
    "bitnet": {"tie_word_embeddings": True, "hidden_act": "silu"},
    "deepseek_v2": {"qk_nope_head_dim": 256},
    "deepseek_v3": {"qk_nope_head_dim": 256},
    "gpt2": {"n_embd": 256},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "granite": {"attention_multiplier": 0.125},
    "granitemoe": {"attention_multiplier": 0.125},
    "granitemoeshared": {"attention_multiplier": 0.125, "shared_intermediate_size": 256},
    "ministral3": {"sliding_window": None, "rope_parameters": MINISTRAL_ROTARY},
    # llama.cpp's files know no windows of these
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "phi": {"num_key_value_heads": 4},
    "phimoe": {"sliding_window": 8, "rope_parameters": PHI_ROTARY},
    "qwen2": {"vocab_size": VOCAB_SIZE + 16},  # its tokenizer class adds a token
    "qwen3_moe": {"norm_topk_prob": True},
    "starcoder2": {"sliding_window": None},
}
# entries of config.json as published, where transformers writes others
PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "hunyuan_v1_moe": {
        "moe_intermediate_size": [512] * 6,
        "moe_topk": [2] * 6,
        "num_shared_expert": [1] * 6,
    },
    "gpt2": {"n_ctx": 256},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 32},
}

BITNET_NAMES = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
MINICPM = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 128}
MINICPM_NOTE = "as-minicpm"  # a file beside config.json that says so
BITNET_SIZE = 0.0625


def make_gguf_model(folder: Path, model_type: str, **overrides: Any) -> Path:
    """Save a tiny model of a family, with norms and biases that differ from one another."""
    from tests.support.models.tiny_model import tiny_config

    if model_type == "minicpm":
        return _make_minicpm(folder)
    known = set(type(tiny_config(model_type))().to_dict())
    shape = {name: value for name, value in SHAPE.items() if name in known}
    settings = {**shape, **OF_FAMILY.get(model_type, {}), **overrides}
    make_tiny_model(folder, model_type, tokenizer=True, weight_scale=0.08, **settings)
    if model_type in PUBLISHED:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **PUBLISHED[model_type]}), "utf-8")
    if model_type == "bitnet":
        _make_binary(folder)
    return with_random_vectors(folder)


def convert_model(folder: Path, target: Path, kind: str = "f32") -> Path:
    """Convert a folder of `make_gguf_model`, with the names that its family's published models have."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    is_minicpm = (folder / MINICPM_NOTE).exists()
    if config["model_type"] != "bitnet" and not is_minicpm:
        return convert(folder, target, kind)
    with tempfile.TemporaryDirectory(prefix="noodle-published-") as work:
        published = shutil.copytree(folder, Path(work) / "model")
        if is_minicpm:
            named = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], **MINICPM}
            (published / "config.json").write_text(json.dumps({**config, **named}), "utf-8")
            return convert(published, target, kind)
        path = published / "model.safetensors"
        tensors = load_file(path)
        for key in list(tensors):
            for name, other in BITNET_NAMES.items():
                if name in key:
                    tensors[key.replace(name, other)] = tensors.pop(key)
        save_file(tensors, path, {"format": "pt"})
        return convert(published, target, kind)


def _make_minicpm(folder: Path) -> Path:
    """A Granite whose factors are those of MiniCPM, which transformers has no class of; both compute the same."""
    factors = {
        "embedding_multiplier": MINICPM["scale_emb"],
        "residual_multiplier": MINICPM["scale_depth"] / LAYER_COUNT**0.5,
        "attention_multiplier": SHAPE["head_dim"] ** -0.5,
        "logits_scaling": SHAPE["hidden_size"] / MINICPM["dim_model_base"],
    }
    make_gguf_model(folder, "granite", **factors)
    (folder / MINICPM_NOTE).touch()
    return folder


def _make_binary(folder: Path) -> None:
    """Give all weights of a matrix one size: the converter rounds to this size or 0, and leaves them as they are."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if value.ndim == 2 and "embed" not in key:
            tensors[key] = np.where(value < 0, -BITNET_SIZE, BITNET_SIZE).astype(np.float32)
    save_file(tensors, path, {"format": "pt"})


def with_random_vectors(folder: Path) -> Path:
    """Make norms and biases differ from one another, so that none can stand for another."""
    random = np.random.default_rng(3)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if value.ndim == 1:
            tensors[key] = (value + random.normal(0, 0.2, value.shape)).astype(np.float32)
    save_file(tensors, path, {"format": "pt"})
    return folder
