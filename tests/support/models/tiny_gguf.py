"""Tiny llama-architecture GGUF files with known weights, as llama.cpp's converter would write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import quantize

Weights = dict[str, npt.NDArray[np.float32]]  # in the names and order of transformers

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class TinyLlama:
    """Sizes of the model; rows are multiples of 32, as the quantized formats require."""

    layers: int = 3
    hidden: int = 64
    inner: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    tied: bool = True
    dtype: GGMLQuantizationType = GGMLQuantizationType.F32
    pre: str = "smollm"
    architecture: str = "llama"
    more: dict[str, Any] = field(default_factory=dict)  # further keys under "llama."
    more_tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    add_bos: bool = False


BYTE_TOKENS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = ["<|end|>", "<|start|>", "<think>", *BYTE_TOKENS, "Ġt", "he", "Ġthe", "ĠĠ"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]


def tiny_weights(shape: TinyLlama, seed: int = 0) -> Weights:
    """Return random weights under the names of transformers."""
    generator = np.random.default_rng(seed)

    def drawn(*size: int) -> npt.NDArray[np.float32]:
        return generator.standard_normal(size, dtype=np.float32)

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {"model.embed_tokens.weight": drawn(len(TOKENS), shape.hidden), "model.norm.weight": drawn(shape.hidden)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        weights[f"{at}input_layernorm.weight"] = drawn(shape.hidden)
        weights[f"{at}post_attention_layernorm.weight"] = drawn(shape.hidden)
        weights[f"{at}self_attn.q_proj.weight"] = drawn(query, shape.hidden)
        weights[f"{at}self_attn.k_proj.weight"] = drawn(key, shape.hidden)
        weights[f"{at}self_attn.v_proj.weight"] = drawn(key, shape.hidden)
        weights[f"{at}self_attn.o_proj.weight"] = drawn(shape.hidden, query)
        weights[f"{at}mlp.gate_proj.weight"] = drawn(shape.inner, shape.hidden)
        weights[f"{at}mlp.up_proj.weight"] = drawn(shape.inner, shape.hidden)
        weights[f"{at}mlp.down_proj.weight"] = drawn(shape.hidden, shape.inner)
    if not shape.tied:
        weights["lm_head.weight"] = drawn(len(TOKENS), shape.hidden)
    return weights


def write_tiny_gguf(path: Path, shape: TinyLlama, weights: Weights | None = None) -> Path:
    """Write the file: q and k in llama.cpp's order, matrices in the shape's dtype, norms in F32."""
    writer = GGUFWriter(path, shape.architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in shape.more.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{shape.architecture}.{key}", value)
    add_tokenizer(writer, shape.pre, shape.add_bos)
    for name, values in (tiny_weights(shape) if weights is None else weights).items():
        stored = gguf_order(name, values, shape)
        if values.ndim == 1 or shape.dtype == GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), stored)
        else:
            writer.add_tensor(gguf_name(name), quantize(stored, shape.dtype), raw_dtype=shape.dtype)
    for name, values in shape.more_tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: GGUFWriter, pre: str, add_bos: bool = False) -> None:
    """Add a byte-level vocabulary that begins with three added tokens."""
    kinds = [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(TOKENS) - len(kinds)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ messages }}")


def gguf_name(name: str) -> str:
    """Return the name that llama.cpp gives a tensor of transformers."""
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def gguf_order(name: str, values: npt.NDArray[np.float32], shape: TinyLlama) -> npt.NDArray[np.float32]:
    """Interleave the two rotated halves of q or k, head by head."""
    heads = shape.heads if ".q_proj." in name else shape.kv_heads if ".k_proj." in name else 0
    if not heads:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def split_in_two(whole: Path, first_part: Path) -> list[Path]:
    """Write a file's tensors as two parts, the first without any, as llama.cpp's splitter does on demand."""
    reader = GGUFReader(whole)
    second_part = first_part.with_name(first_part.name.replace("00001-of", "00002-of"))
    for number, path in enumerate((first_part, second_part)):
        writer = GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        if number == 1:
            for tensor in reader.tensors:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [first_part, second_part]
