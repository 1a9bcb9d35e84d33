"""Loads a slice that ggml computes, reading only the slice's own tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from noodle.errors import ConfigurationError, PlanDoesNotFit, UnsupportedModel
from noodle.model.files import model_digest
from noodle.model.formats import WEIGHTS
from services.stage.executors.base import Fetch, ReadCounter, ReadProgress, ignore_progress, nothing_to_fetch
from services.stage.executors.ggml.backend import CPU, GgmlDevice, load_ggml
from services.stage.executors.ggml.families import ModelShape, shape_of
from services.stage.executors.ggml.gguf import GgufTensors, gguf_in
from services.stage.executors.ggml.graph import GgmlCalls
from services.stage.executors.ggml.kernels import dot_counts, flash_attention_kernel, packed_weights
from services.stage.executors.ggml.layers.operations import INTERLEAVED, NEOX, SliceTensors
from services.stage.executors.ggml.slice import GgmlSlice
from services.stage.executors.ggml.tensor_map import TensorMap
from services.stage.executors.ggml.weights import GgmlTensors, TensorLayout, WeightBlock, WeightMaker, own_memory
from services.stage.executors.safetensors import SafetensorsFolder

KV_TYPE_NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8}


def load_ggml_slice(
    folder: Path,
    start_layer: int,
    end_layer: int,
    *,
    config: Any,
    weights: str,
    kv_dtype: str = "f16",
    context_length: int,
    threads: int,
    device_name: str = CPU,
    progress: ReadProgress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
    cache_dir: Path | None = None,
) -> GgmlSlice:
    """Load layers [start_layer, end_layer) of the model in `folder`, with embeddings and head at the model's ends.

    `config` is transformers' config object of the folder. `weights` is a type of `WEIGHTS`, in which matrices are held
    and computed with; `gguf` uses the tensors of the folder's .gguf file as stored. Converted weights are kept in
    `cache_dir` for later starts and other stages of the machine. `device_name` is ggml's; `threads` apply to its CPU.
    `fetch` is called before the first tensor is read.
    Raises GgmlUnavailable, UnsupportedModel with what ggml lacks for this model, ModelNotFound, or PlanDoesNotFit for
    layers that the model does not have.
    """
    if weights not in (*WEIGHTS, "gguf"):
        raise ConfigurationError(f"weights {weights!r} are none of {', '.join(WEIGHTS)}.", cure="Choose one of these.")
    if kv_dtype not in KV_TYPE_NUMBERS:
        raise ConfigurationError(
            f"a KV cache in {kv_dtype!r} is none of {', '.join(KV_TYPE_NUMBERS)}.", cure="Choose one of these."
        )
    library = load_ggml()
    ggml = GgmlCalls(library.module)
    shape = shape_of(config, context_length)
    if not 0 <= start_layer < end_layer <= shape.layer_count:
        raise PlanDoesNotFit(
            f"layers {start_layer} to {end_layer} were requested, but {folder} has {shape.layer_count}.",
            cure="Make the split add up to the model's layers.",
        )
    row_bytes = _row_bytes(ggml, shape, kv_dtype)
    counter = ReadCounter(progress)
    pairing = NEOX
    if weights == "gguf":
        path = gguf_in(folder)
        file = GgufTensors(ggml, path, str(config.model_type), shape, counter)
        blocks = file.blocks(TensorMap(shape, file.shape_of_key, str(path)).of_slice(start_layer, end_layer))
        pairing = INTERLEAVED if file.is_interleaved else NEOX
    else:
        files = SafetensorsFolder(folder)

        def shape_of_key(key: str) -> tuple[int, ...] | None:
            return files.entry(key).shape if key in files.file_by_key else None

        wanted = TensorMap(shape, shape_of_key, str(folder)).of_slice(start_layer, end_layer)
        kept_folder = _kept_folder(cache_dir, folder, weights, library.version)
        blocks = WeightMaker(ggml, files, counter, kept_folder).blocks(wanted, weights, fetch)
    device = GgmlDevice(ggml, device_name, library.backend(threads, device_name))
    kernels = packed_weights(ggml) if device.is_host else None
    packed_names: frozenset[tuple[str, str]] = frozenset()
    if kernels is not None:
        # tied embeddings are read more often as the head
        packed_names = kernels.pack(blocks, also_embedding=end_layer == shape.layer_count and shape.tied)
    blocks["rotary"] = _rotary_block(shape, start_layer, end_layer)
    loaded = GgmlTensors(device, blocks)
    packed = frozenset(loaded.by_block[block][name] for block, name in packed_names)
    key_type = KV_TYPE_NUMBERS[kv_dtype]
    tensors = SliceTensors(
        **_weights(loaded.by_block, shape, start_layer, end_layer),
        pairing=pairing,
        key_type=key_type,
        row_bytes=row_bytes,
        exact=weights == "f32",
        kernels=kernels,
        packed=packed,
        attention=flash_attention_kernel(ggml, shape.head_dim, key_type) if device.is_host else None,
    )
    if device.is_host:
        matrices = [*(tensor for layer in tensors.layers for tensor in layer.values()), *tensors.head.values()]
        counts = dot_counts(device, [tensor for tensor in matrices if tensor not in packed])
        tensors = replace(tensors, dot_counts=counts)
    return GgmlSlice(
        device, loaded, tensors, shape, start_layer=start_layer, end_layer=end_layer, bytes_read=counter.bytes_read
    )


def _row_bytes(ggml: GgmlCalls, shape: ModelShape, kv_dtype: str) -> int:
    """Bytes of one token's K in one layer."""
    number = KV_TYPE_NUMBERS[kv_dtype]
    if shape.head_dim % ggml.ggml_blck_size(number):
        raise UnsupportedModel(
            f"a KV cache in {kv_dtype} needs a head dimension that is a multiple of {ggml.ggml_blck_size(number)}, and "
            f"this model's is {shape.head_dim}.",
            cure="Choose f16 for its KV cache.",
        )
    return int(ggml.ggml_row_size(number, shape.head_dim)) * shape.kv_heads


def _kept_folder(cache_dir: Path | None, folder: Path, weights: str, version: str) -> Path | None:
    if cache_dir is None:
        return None
    ggml = re.sub(r"[^0-9A-Za-z.]+", "-", version).strip("-")
    return cache_dir / "ggml" / f"{model_digest(folder)[:16]}-{weights}-{ggml}"


def _rotary_block(shape: ModelShape, start_layer: int, end_layer: int) -> WeightBlock:
    """The factors that ggml divides positions by: the inverse frequencies of each layer's pairs."""
    length = shape.head_dim // 2
    layers = end_layer - start_layer
    padded = -(-length // 16) * 16
    memory = own_memory(layers * padded * 4).view(np.float32).reshape(layers, padded)
    layouts: list[TensorLayout] = []
    for number in range(layers):
        rotary = shape.rotaries[start_layer + number]
        if rotary is not None:
            memory[number, : len(rotary.frequencies)] = np.float32(1) / rotary.frequencies
        layouts.append(TensorLayout(str(number), 0, (length,), number * memory.strides[0], 4 * length))
    return WeightBlock(tuple(layouts), memory.reshape(-1).view(np.uint8))


def _weights(blocks: dict[str, dict[str, int]], shape: ModelShape, start_layer: int, end_layer: int) -> dict[str, Any]:
    embedding = blocks.get("embedding", {}).get("embedding.weight", 0)
    ties_head = end_layer == shape.layer_count and shape.tied
    return {
        "layers": tuple(blocks[str(number)] for number in range(start_layer, end_layer)),
        "embedding": embedding if start_layer == 0 else 0,
        "positions": blocks.get("positions", {}).get("positions.weight", 0),
        "final_norm": blocks.get("final_norm", {}),
        "head": {"head.weight": embedding} if ties_head else blocks.get("head", {}),
        "frequency_factors": tuple(
            blocks["rotary"][str(number - start_layer)] if shape.rotaries[number] is not None else 0
            for number in range(start_layer, end_layer)
        ),
    }
