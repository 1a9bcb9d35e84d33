"""Turns a llama-architecture GGUF file into a safetensors folder with numpy alone; knows no torch and no cache.

What it can not carry over exactly it refuses by name: nothing in the file is left out without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor

from noodle.errors import UnsupportedModel
from services.coordinator.models.gguf_tokenizer import generation_ids, write_tokenizer
from services.coordinator.models.gguf_weights import ITEM_BYTES, StoredTensor, stored_dtype, write_weights

CONVERTED_ARCHITECTURE = "llama"
CONVERT_CURE = "Convert it where torch is installed: noodle convert FILE FOLDER"
WEIGHTS_NAME = "model.safetensors"

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS_NAME = "rope_freqs.weight"

# every key that says how to compute; one that is not here would be ignored, so it is refused
KNOWN_KEYS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufModel:
    """An open GGUF file of the llama architecture, checked to be convertible."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`; raises UnsupportedModel for what can not be converted exactly."""
        try:
            reader = GGUFReader(path)
            # Python values of every key, once: ReaderField.contents() walks arrays item by item
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UnsupportedModel(
                f"{path} is not a readable GGUF file ({error}).", cure="It may be cut short: fetch it again."
            ) from error
        architecture = self.metadata.get("general.architecture")
        if architecture != CONVERTED_ARCHITECTURE:
            raise UnsupportedModel(
                f"{path} is of the architecture {architecture!r}; only {CONVERTED_ARCHITECTURE!r} is converted here.",
                cure=CONVERT_CURE,
            )
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()
        self.tensors = self._stored_tensors()
        self.config["dtype"] = self._config_dtype()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they will be stored."""
        return sum(tensor.byte_count for tensor in self.tensors)

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{CONVERTED_ARCHITECTURE}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UnsupportedModel(
                f"{self.path}: {CONVERTED_ARCHITECTURE}.{key} is {value!r}, not a positive number.", cure=CONVERT_CURE
            )
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if value != int(value):
            raise UnsupportedModel(
                f"{self.path}: {CONVERTED_ARCHITECTURE}.{key} is {value!r}, not a whole number.", cure=CONVERT_CURE
            )
        return int(value)

    def _config(self) -> dict[str, Any]:
        """config.json as transformers' LlamaConfig reads it."""
        self._refuse_what_would_be_ignored()
        hidden_size = self._count("embedding_length")
        heads = self._count("attention.head_count")
        head_dim = self._count("attention.key_length", self.metadata.get("llama.rope.dimension_count"))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                raise UnsupportedModel(
                    f"{self.path}: {CONVERTED_ARCHITECTURE}.{key} is not the head dimension {head_dim}.",
                    cure=CONVERT_CURE,
                )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": _shortest(self._number("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope_parameters(head_dim),
            "attention_bias": False,
            "mlp_bias": False,
            # the file has no head of its own: the embedding is used again
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "vocab_size": self._vocab_size(hidden_size),
            **generation_ids(self.metadata),
        }

    def _refuse_what_would_be_ignored(self) -> None:
        prefix = f"{CONVERTED_ARCHITECTURE}."
        for key in self.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in KNOWN_KEYS:
                raise UnsupportedModel(f"{self.path} sets {key}, which is not known here.", cure=CONVERT_CURE)
        if self.metadata.get(f"{prefix}expert_count", 0):
            raise UnsupportedModel(f"{self.path} is a mixture of experts (mixtral).", cure=CONVERT_CURE)

    def _vocab_size(self, hidden_size: int) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2 or int(embedding.shape[0]) != hidden_size:
            raise UnsupportedModel(
                f"{self.path} has no token_embd.weight of {hidden_size} columns.",
                cure="Take a file of the whole model, not one of its parts.",
            )
        return int(embedding.shape[1])

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        # files older than the key were all made with 10000, as the format's own description says
        theta = _shortest(self._number("rope.freq_base", 10000.0))
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        factors = self._tensors.get(ROPE_FACTORS_NAME)
        if factors is not None:
            return llama3_rope_parameters(np.asarray(factors.data, dtype=np.float64).reshape(-1), theta, head_dim)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            return {"rope_type": "linear", "rope_theta": theta, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            parameters: dict[str, Any] = {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": self._number("rope.scaling.factor"),
                "original_max_position_embeddings": self._count("rope.scaling.original_context_length"),
            }
            for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                if f"llama.rope.scaling.{theirs}" in self.metadata:
                    parameters[ours] = self._number(f"rope.scaling.{theirs}")
            return parameters
        raise UnsupportedModel(f"{self.path} scales rotary positions as {kind!r}.", cure=CONVERT_CURE)

    def _stored_tensors(self) -> tuple[StoredTensor, ...]:
        stored = [self._stored(tensor) for name, tensor in self._tensors.items() if name != ROPE_FACTORS_NAME]
        expected = {f"{TENSOR_NAMES[name]}.weight" for name in ("token_embd", "output_norm")}
        in_layer = [name for name in TENSOR_NAMES if name not in ("token_embd", "output_norm", "output")]
        for layer in range(self.config["num_hidden_layers"]):
            expected.update(f"model.layers.{layer}.{TENSOR_NAMES[name]}.weight" for name in in_layer)
        found = {tensor.name for tensor in stored} - {"lm_head.weight"}
        if found != expected:
            odd = sorted(found ^ expected)
            raise UnsupportedModel(
                f"{self.path}: {len(odd)} tensors are missing or too many, the first is {odd[0]}.",
                cure="Take a file of the whole model, not one of its parts.",
            )
        return tuple(sorted(stored, key=lambda tensor: tensor.name))

    def _stored(self, tensor: ReaderTensor) -> StoredTensor:
        parts = tensor.name.split(".")
        layered = len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[3] == "weight"
        kind = parts[2] if layered else parts[0]
        if kind not in TENSOR_NAMES or not (layered or (len(parts) == 2 and parts[1] == "weight")):
            raise UnsupportedModel(f"{self.path} holds the tensor {tensor.name}, not known here.", cure=CONVERT_CURE)
        name = f"model.layers.{int(parts[1])}.{TENSOR_NAMES[kind]}" if layered else TENSOR_NAMES[kind]
        # GGUF counts dimensions from the innermost
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != self._expected_shape(kind):
            raise UnsupportedModel(
                f"{self.path}: {tensor.name} has the shape {list(shape)}, not {list(self._expected_shape(kind))}.",
                cure=CONVERT_CURE,
            )
        rotary_heads = {
            "attn_q": self.config["num_attention_heads"],
            "attn_k": self.config["num_key_value_heads"],
        }.get(kind, 0)
        dtype = stored_dtype(tensor)
        return StoredTensor(f"{name}.weight", dtype, shape, tensor, rotary_heads)

    def _expected_shape(self, kind: str) -> tuple[int, ...]:
        config = self.config
        hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        query = config["num_attention_heads"] * config["head_dim"]
        key = config["num_key_value_heads"] * config["head_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd": (vocab, hidden),
            "output": (vocab, hidden),
            "attn_q": (query, hidden),
            "attn_k": (key, hidden),
            "attn_v": (key, hidden),
            "attn_output": (hidden, query),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        return shapes.get(kind, (hidden,))

    def _config_dtype(self) -> str:
        """What most bytes are stored as; norms are F32 in every file."""
        by_dtype = dict.fromkeys(ITEM_BYTES, 0)
        for tensor in self.tensors:
            by_dtype[tensor.dtype] += tensor.byte_count
        return CONFIG_DTYPES[max(by_dtype, key=lambda dtype: by_dtype[dtype])]


def _shortest(value: float) -> float:
    """1e-05 for the float32 that a GGUF keeps of it; the float32 it stands for stays the same."""
    return float(str(np.float32(value)))


def llama3_rope_parameters(factors: npt.NDArray[np.float64], theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling whose per-frequency divisors are `factors` [head_dim / 2].

    A GGUF keeps only the divisors. The largest is the factor, and every published llama 3 has the other three numbers
    in common; divisors that these do not give again are refused, so nothing is guessed.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max(initial=1.0))
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    again = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != again.shape or not np.allclose(factors, again, rtol=1e-4):
        raise UnsupportedModel(
            "The GGUF file scales rotary positions by divisors that are not llama 3's.", cure=CONVERT_CURE
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def write_model_folder(model: GgufModel, folder: Path, progress: Callable[[int], None]) -> str:
    """Write config, tokenizer and weights into the empty `folder`; `progress` hears bytes of weights written.

    Returns the sha256 of the weights file. Memory: one q or k tensor, or some 50 MB, whichever is larger.
    """
    config = json.dumps(model.config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    write_tokenizer(model.metadata, folder, model.config["max_position_embeddings"])
    return write_weights(model.tensors, folder / WEIGHTS_NAME, progress)
