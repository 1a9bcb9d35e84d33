"""The config.json that a GGUF file's header stands for."""

from __future__ import annotations

from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.gguf import GgufFile

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by architecture


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """Return the config of a file's model; raises UnsupportedModel."""
    architecture = file.architecture
    if architecture not in MODEL_TYPES:
        raise UnsupportedModel(
            f"{file.path} is of architecture {architecture!r}, which noodle does not compute.",
            cure=f"Choose a model of one of these: {', '.join(sorted(MODEL_TYPES))}.",
        )

    def value(key: str) -> Any:
        found = file.metadata.get(f"{architecture}.{key}")
        if found is None:
            raise UnsupportedModel(f"{file.path} does not set {architecture}.{key}.", cure="Fetch it again.")
        return found

    heads = value("attention.head_count")
    return {
        "model_type": MODEL_TYPES[architecture],
        "num_hidden_layers": value("block_count"),
        "hidden_size": value("embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": file.metadata.get(f"{architecture}.attention.key_length", value("embedding_length") // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.entries["token_embd.weight"].shape[0],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.entries,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": file.metadata.get(f"{architecture}.rope.freq_base", 10000.0),
        },
    }
