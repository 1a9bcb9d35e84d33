"""Convert a llama-architecture GGUF file to a safetensors folder with numpy; refuse by name what would be lost.

Quantized tensors become float32: the exact values of the quantized ones, as transformers reads them from the same file.
Tensors stored as F16 or BF16 keep their bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from noodle.errors import UnsupportedModel
from services.coordinator.models.gguf_tokenizer import generation_ids, write_tokenizer

CONVERTED_ARCHITECTURE = "llama"
CONVERT_CURE = "Convert it where torch is installed: noodle convert FILE FOLDER"
WEIGHTS_NAME = "model.safetensors"
CHUNK_ITEMS = 4 << 20  # items dequantized at once: bounds memory to about 50 MB beside one q or k tensor

# name in a GGUF: name in transformers, and the dimensions of the weight
TENSORS = {
    "token_embd": ("model.embed_tokens", ("vocab", "hidden")),
    "output_norm": ("model.norm", ("hidden",)),
    "output": ("lm_head", ("vocab", "hidden")),
    "attn_norm": ("input_layernorm", ("hidden",)),
    "attn_q": ("self_attn.q_proj", ("query", "hidden")),
    "attn_k": ("self_attn.k_proj", ("key", "hidden")),
    "attn_v": ("self_attn.v_proj", ("key", "hidden")),
    "attn_output": ("self_attn.o_proj", ("hidden", "query")),
    "ffn_norm": ("post_attention_layernorm", ("hidden",)),
    "ffn_gate": ("mlp.gate_proj", ("inner", "hidden")),
    "ffn_up": ("mlp.up_proj", ("inner", "hidden")),
    "ffn_down": ("mlp.down_proj", ("hidden", "inner")),
}
OUTSIDE_LAYERS = ("token_embd", "output_norm", "output")
ROPE_FACTORS_NAME = "rope_freqs.weight"

# all keys that affect the computation; an unknown one would be ignored, so it is refused
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
SAFETENSORS_DTYPES = {GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the safetensors file."""

    name: str
    dtype: str  # safetensors' name: F32, F16 or BF16
    shape: tuple[int, ...]
    source: ReaderTensor
    rotary_heads: int  # heads whose rows go back to transformers' order; 0 for all tensors but q and k

    @property
    def byte_count(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class GgufModel:
    """An open GGUF file of the llama architecture, checked to be convertible."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`; raises UnsupportedModel if it cannot be converted exactly."""
        self.path = path
        try:
            reader = GGUFReader(path)
            # read once: ReaderField.contents() walks arrays item by item
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UnsupportedModel(
                f"{path} is not a readable GGUF file ({error}).", cure="It may be cut short: fetch it again."
            ) from error
        architecture = self.metadata.get("general.architecture")
        if architecture != CONVERTED_ARCHITECTURE:
            raise self._refusal(
                f"the architecture {architecture!r} is not converted here, only {CONVERTED_ARCHITECTURE!r}."
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()
        self.tensors = self._stored_tensors()
        self.config["dtype"] = self._config_dtype()

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.byte_count for tensor in self.tensors)

    def _refusal(self, problem: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.path}: {problem}", cure=CONVERT_CURE)

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{CONVERTED_ARCHITECTURE}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._refusal(f"{CONVERTED_ARCHITECTURE}.{key} is {value!r}, not a positive number.")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if value != int(value):
            raise self._refusal(f"{CONVERTED_ARCHITECTURE}.{key} is {value!r}, not a whole number.")
        return int(value)

    def _config(self) -> dict[str, Any]:
        """The config.json that transformers' LlamaConfig reads."""
        self._refuse_unknown_keys()
        hidden_size = self._count("embedding_length")
        heads = self._count("attention.head_count")
        head_dim = self._count("attention.key_length", self.metadata.get("llama.rope.dimension_count"))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                raise self._refusal(f"{CONVERTED_ARCHITECTURE}.{key} is not the head dimension {head_dim}.")
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
            # without a head of its own, the embedding serves as the head
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "vocab_size": self._vocab_size(hidden_size),
            **generation_ids(self.metadata),
        }

    def _refuse_unknown_keys(self) -> None:
        prefix = f"{CONVERTED_ARCHITECTURE}."
        for key in self.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in KNOWN_KEYS:
                raise self._refusal(f"{key} is unknown.")
        if self.metadata.get(f"{prefix}expert_count", 0):
            raise self._refusal("it is a mixture of experts (mixtral).")

    def _vocab_size(self, hidden_size: int) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2 or int(embedding.shape[0]) != hidden_size:
            raise UnsupportedModel(
                f"{self.path} has no token_embd.weight of {hidden_size} columns.",
                cure="Use a file of the whole model, not one of its parts.",
            )
        return int(embedding.shape[1])

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        # the format's default: files older than the key were made with it
        theta = _shortest(self._number("rope.freq_base", 10000.0))
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        factors = self._tensors.get(ROPE_FACTORS_NAME)
        if factors is not None:
            return llama3_rope_parameters(np.asarray(factors.data, dtype=np.float64).reshape(-1), theta, head_dim)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("linear", "yarn"):
            raise self._refusal(f"it scales rotary positions by the unknown method {kind!r}.")
        parameters = {"rope_type": kind, "rope_theta": theta, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = self._count("rope.scaling.original_context_length")
            for name in ("beta_fast", "beta_slow"):
                if f"llama.rope.scaling.yarn_{name}" in self.metadata:
                    parameters[name] = self._number(f"rope.scaling.yarn_{name}")
        return parameters

    def _stored_tensors(self) -> tuple[StoredTensor, ...]:
        stored = [self._stored(tensor) for name, tensor in self._tensors.items() if name != ROPE_FACTORS_NAME]
        expected = {f"{TENSORS[name][0]}.weight" for name in ("token_embd", "output_norm")}
        for layer in range(self.config["num_hidden_layers"]):
            expected.update(
                f"model.layers.{layer}.{TENSORS[name][0]}.weight" for name in TENSORS if name not in OUTSIDE_LAYERS
            )
        found = {tensor.name for tensor in stored} - {"lm_head.weight"}
        if found != expected:
            odd = sorted(found ^ expected)
            raise UnsupportedModel(
                f"{self.path}: {len(odd)} tensors are missing or too many, the first is {odd[0]}.",
                cure="Use a file of the whole model, not one of its parts.",
            )
        return tuple(sorted(stored, key=lambda tensor: tensor.name))

    def _stored(self, tensor: ReaderTensor) -> StoredTensor:
        parts = tensor.name.split(".")
        is_in_layer = len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[3] == "weight"
        kind = parts[2] if is_in_layer else parts[0]
        if kind not in TENSORS or not (is_in_layer or (len(parts) == 2 and parts[1] == "weight")):
            raise self._refusal(f"the tensor {tensor.name} is unknown.")
        name, dimensions = TENSORS[kind]
        # GGUF counts dimensions from the innermost
        shape = tuple(int(size) for size in reversed(tensor.shape))
        expected_shape = tuple(self._sizes()[dimension] for dimension in dimensions)
        if shape != expected_shape:
            raise self._refusal(f"{tensor.name} has the shape {list(shape)}, not {list(expected_shape)}.")
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        return StoredTensor(
            name=f"model.layers.{int(parts[1])}.{name}.weight" if is_in_layer else f"{name}.weight",
            dtype=SAFETENSORS_DTYPES.get(tensor.tensor_type, "F32"),
            shape=shape,
            source=tensor,
            rotary_heads=heads.get(kind, 0),
        )

    def _sizes(self) -> dict[str, int]:
        config = self.config
        return {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "inner": config["intermediate_size"],
            "query": config["num_attention_heads"] * config["head_dim"],
            "key": config["num_key_value_heads"] * config["head_dim"],
        }

    def _config_dtype(self) -> str:
        """The dtype of most bytes; norms are F32 in every file."""
        by_dtype = dict.fromkeys(ITEM_BYTES, 0)
        for tensor in self.tensors:
            by_dtype[tensor.dtype] += tensor.byte_count
        return CONFIG_DTYPES[max(by_dtype, key=by_dtype.__getitem__)]


def _shortest(value: float) -> float:
    """The shortest decimal of the same float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def llama3_rope_parameters(factors: npt.NDArray[np.float64], theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling with the per-frequency divisors `factors` [head_dim / 2].

    A GGUF keeps only the divisors. The largest one is the factor; the other three numbers are the same in every
    published llama 3. Divisors that these numbers do not reproduce are refused.
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


def write_model_folder(model: GgufModel, folder: Path, progress: Callable[[int], None]) -> None:
    """Write config, tokenizer and weights to the empty `folder`; `progress` receives the bytes of weights written.

    Needs memory for one q or k tensor, and at least 50 MB.
    """
    config = json.dumps(model.config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    write_tokenizer(model.metadata, folder, model.config["max_position_embeddings"])
    _write_weights(model.tensors, folder / WEIGHTS_NAME, progress)


def _write_weights(tensors: Sequence[StoredTensor], path: Path, progress: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.byte_count],
        }
        offset += tensor.byte_count
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8 bytes
    written = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for array in _converted_chunks(tensor):
                file.write(array.data)
                written += array.nbytes
                progress(written)
    if written != offset:
        raise AssertionError(f"{path}: {written} bytes of weights written, {offset} announced in the header")


def _converted_chunks(tensor: StoredTensor) -> Iterator[npt.NDArray[Any]]:
    """The tensor's items in order, as contiguous arrays of its stored dtype."""
    data = tensor.source.data
    if tensor.rotary_heads:
        yield np.ascontiguousarray(_undo_rotary_permutation(_items(tensor, data), tensor.rotary_heads))
        return
    rows_at_once = max(1, CHUNK_ITEMS // tensor.shape[-1]) if data.ndim > 1 else data.shape[0]
    for start in range(0, data.shape[0], rows_at_once):
        yield np.ascontiguousarray(_items(tensor, data[start : start + rows_at_once]))


def _items(tensor: StoredTensor, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if tensor.dtype != "F32":
        return data.view(np.uint16)  # the bits; numpy has no bfloat16
    items: npt.NDArray[np.float32] = dequantize(data, tensor.source.tensor_type).astype(np.float32, copy=False)
    return items


def _undo_rotary_permutation(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder [head, pair, half] to [head, half, pair]: GGUF interleaves the two halves that transformers rotates."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
