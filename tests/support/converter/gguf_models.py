"""Tiny models whose rows are whole blocks of every ggml type, as folders that the converter takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.models.tiny_model import make_tiny_model

VOCAB_SIZE = 320
# K-quants have blocks of 256 values
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "head_dim": 64,
}
# config attributes of a family, as its published models have them
OF_FAMILY: dict[str, dict[str, Any]] = {}
# entries of config.json as published, where transformers writes others
PUBLISHED: dict[str, dict[str, Any]] = {"phimoe": {"architectures": ["PhiMoEForCausalLM"]}}


def make_gguf_model(folder: Path, model_type: str, **overrides: Any) -> Path:
    """Save a tiny model of a family, with norms and biases that differ from one another."""
    from tests.support.models.tiny_model import tiny_config

    known = set(type(tiny_config(model_type))().to_dict())
    shape = {name: value for name, value in SHAPE.items() if name in known}
    settings = {**shape, **OF_FAMILY.get(model_type, {}), **overrides}
    make_tiny_model(folder, model_type, tokenizer=True, weight_scale=0.08, **settings)
    if model_type in PUBLISHED:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **PUBLISHED[model_type]}), "utf-8")
    return with_random_vectors(folder)


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
