"""Quantised versions of tiny models: of a GGUF file, and the same values in a folder that transformers reads.

Rows are quantised on their own, and the converter moves rows without changing them: rounding a folder's rows gives the
values that the file's blocks hold.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from services.stage.executors.ggml.backend import load_ggml
from services.stage.executors.ggml.graph import GgmlCalls

Floats = npt.NDArray[np.float32]

# llama.cpp's quantize keeps routers as they are, and what is no matrix
GGUF_PLAIN = re.compile(r"ffn_gate_inp|_norm\.|\.bias$|position_embd|exp_probs_b|attn_sinks|rope_freqs|ffn_act_")
FOLDER_PLAIN = re.compile(
    r"router|correction_bias|gate\.(wg\.)?weight$|shared_expert_gate|norm|[._]bias$|\.wpe\.|sinks|layernorm"
)
# stored [in, out] by GPT-2 and gpt_oss
TRANSPOSED = re.compile(r"^transformer\.h\..*\.c_(attn|proj|fc)\.weight$|mlp\.experts\.(gate_up|down)_proj$")
GATES = re.compile(r"mlp\.gate\.|moe\.gate\.|block_sparse_moe\.gate\.")


def quantized_gguf(source: Path, target: Path, kind: str) -> Path:
    """Write a GGUF of F32 again with its matrices in `kind`, as llama.cpp's quantize does."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = np.array(tensor.data, np.float32)
        if values.ndim < 2 or GGUF_PLAIN.search(tensor.name):
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, _blocks(values, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def rounded_folder(source: Path, target: Path, kind: str) -> Path:
    """Copy a model folder with its matrices rounded to the values that blocks of `kind` hold."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.gguf"))
    path = target / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((source / "config.json").read_text("utf-8"))
    for key, values in tensors.items():
        if values.ndim > 1 and not FOLDER_PLAIN.search(key) and not GATES.search(key):
            rounded = _rounded(values.swapaxes(-1, -2) if TRANSPOSED.search(key) else values, kind)
            if config["model_type"].startswith("deepseek") and key.endswith("kv_b_proj.weight"):
                rounded = _rounded_by_head(values, kind, config)
            rounded = rounded.swapaxes(-1, -2) if TRANSPOSED.search(key) else rounded
            tensors[key] = np.ascontiguousarray(rounded, np.float32)
    save_file(tensors, path, {"format": "pt"})
    return target


def _rounded(values: Floats, kind: str) -> Floats:
    return dequantize(_blocks(values, kind), GGMLQuantizationType[kind]).reshape(values.shape)


def _rounded_by_head(values: Floats, kind: str, config: dict[str, Any]) -> Floats:
    """The matrix of K and V of latent attention: the converter splits it by head and transposes K's part."""
    plain = config["qk_nope_head_dim"]
    heads = values.reshape(config["num_attention_heads"], -1, values.shape[-1])
    key = _rounded(heads[:, :plain].swapaxes(1, 2), kind).swapaxes(1, 2)
    return np.concatenate([key, _rounded(heads[:, plain:], kind)], axis=1).reshape(values.shape)


def _blocks(values: Floats, kind: str) -> npt.NDArray[np.uint8]:
    """Rows in one of ggml's types, [..., bytes of a row]."""
    ggml: Any = GgmlCalls(load_ggml().module)
    number = int(GGMLQuantizationType[kind])
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    target = np.empty((len(rows), int(ggml.ggml_row_size(number, rows.shape[1]))), np.uint8)
    ggml.ggml_quantize_chunk(number, rows.ctypes.data, target.ctypes.data, 0, *rows.shape, None)
    return target.reshape(*values.shape[:-1], -1)
