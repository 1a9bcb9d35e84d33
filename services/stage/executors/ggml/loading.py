"""Loads a slice that ggml computes, reading only the slice's own tensors."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from noodle.errors import ConfigurationError, PlanDoesNotFit, UnsupportedModel
from noodle.model.files import model_digest, read_config
from noodle.model.formats import STORED, WEIGHTS
from noodle.model.gguf import read_gguf
from noodle.model.gguf_config import factor_tensors
from services.stage.executors.base import Fetch, ReadCounter, ReadProgress, ignore_progress, nothing_to_fetch
from services.stage.executors.ggml.backend import CPU, GgmlDevice, load_ggml
from services.stage.executors.ggml.graph import GgmlCalls
from services.stage.executors.ggml.kernels.attention import flash_attention_kernel
from services.stage.executors.ggml.kernels.products import packed_weights
from services.stage.executors.ggml.kernels.threads import GraphThreads
from services.stage.executors.ggml.layers.operations import INTERLEAVED, NEOX, SliceTensors
from services.stage.executors.ggml.shape import ModelShape, shape_of
from services.stage.executors.ggml.slice import GgmlSlice
from services.stage.executors.ggml.tensor_map import ACTIVATION_VALUES, TensorMap, as_in_gguf, refuse_unread
from services.stage.executors.ggml.weights import (
    GgmlTensors,
    TensorLayout,
    WeightBlock,
    WeightMaker,
    own_memory,
)
from services.stage.executors.tensor_files import open_tensor_files

log = logging.getLogger(__name__)

KV_TYPE_NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8}


def load_ggml_slice(
    model: Path,
    start_layer: int,
    end_layer: int,
    *,
    weights: str,
    kv_dtype: str = "f16",
    context_length: int,
    threads: int,
    device_name: str = CPU,
    progress: ReadProgress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
    cache_dir: Path | None = None,
) -> GgmlSlice:
    """Load layers [start_layer, end_layer) of a model, with embeddings and head at the model's ends.

    `model` is a folder with safetensors or a GGUF file. `weights` is a type of `WEIGHTS`, in which matrices are held
    and computed with; `stored` is the type in which the files hold each of them. Converted weights are kept in
    `cache_dir` for later starts and other stages of the machine. `device_name` is ggml's; `threads` apply to its CPU.
    `fetch` receives the names of the tensors that will be read.
    Raises GgmlUnavailable, UnsupportedModel with what ggml lacks for this model, ModelNotFound, or PlanDoesNotFit for
    layers that the model does not have.
    """
    if weights not in WEIGHTS:
        raise ConfigurationError(f"weights {weights!r} are none of {', '.join(WEIGHTS)}.", cure="Choose one of these.")
    if kv_dtype not in KV_TYPE_NUMBERS:
        raise ConfigurationError(
            f"a KV cache in {kv_dtype!r} is none of {', '.join(KV_TYPE_NUMBERS)}.", cure="Choose one of these."
        )
    library = load_ggml()
    ggml = GgmlCalls(library.module)
    config = read_config(model)
    counter = ReadCounter(progress)
    device = GgmlDevice(ggml, device_name, library.backend(threads, device_name))
    files = open_tensor_files(model, is_exact=weights != STORED, fetch=fetch)
    maker = WeightMaker(
        ggml,
        files,
        counter,
        multiplies=device.multiplies,
        threads=max(1, threads),
        kept_folder=None if weights == STORED else _kept_folder(cache_dir, model, weights, library.version),
    )
    shape = shape_of(_with_factors(config, maker, fetch), context_length)
    if not 0 <= start_layer < end_layer <= shape.layer_count:
        raise PlanDoesNotFit(
            f"layers {start_layer} to {end_layer} were requested, but {model} has {shape.layer_count}.",
            cure="Make the split add up to the model's layers.",
        )
    row_bytes = _row_bytes(ggml, shape, kv_dtype)
    in_files = replace(shape, family=as_in_gguf(shape.family)) if files.is_gguf else shape
    wanted = TensorMap(in_files, files.shape_of, str(model)).of_slice(start_layer, end_layer)
    names = [name for tensors in wanted.values() for tensor in tensors for name in tensor.sources]
    if files.is_gguf:
        refuse_unread(model, read_gguf(model).entries.keys(), names, range(start_layer, end_layer))
    files.prepare(names)
    kernels = packed_weights(ggml) if device.is_host else None
    # tied embeddings are read more often as the head
    also_embedding = end_layer == shape.layer_count and shape.tied
    packed_names: set[tuple[str, str]] = set()

    def finish(block_name: str, layout: TensorLayout, block: WeightBlock) -> None:
        if kernels is not None and kernels.is_packed(block_name, layout, also_embedding=also_embedding):
            kernels.pack(layout, block)
            packed_names.add((block_name, layout.name))

    blocks = maker.blocks(wanted, weights, fetch, finish)
    weights_note = files.description(names, held_in="" if weights == STORED else weights)
    if weights_note:
        log.info("layers %d to %d of %s: %s", start_layer, end_layer - 1, model.name, weights_note)
    blocks["rotary"] = _rotary_block(shape, start_layer, end_layer)
    if shape.query_growth:
        blocks["query_scales"] = _query_scales_block(shape)
    activation_values = _activation_values(shape, blocks, start_layer, end_layer)
    loaded = GgmlTensors(device, blocks)
    packed = frozenset(loaded.by_block[block][name] for block, name in packed_names)
    key_type = KV_TYPE_NUMBERS[kv_dtype]
    attention = flash_attention_kernel(
        ggml,
        key_type,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
    )
    tensors = SliceTensors(
        **_weights(loaded.by_block, shape, start_layer, end_layer),
        pairing=INTERLEAVED if shape.interleaved else NEOX,
        key_type=key_type,
        row_bytes=row_bytes,
        exact=weights == "f32",
        activation_values=activation_values,
        kernels=kernels,
        packed=packed,
        attention=attention if device.is_host else None,
    )
    return GgmlSlice(
        device,
        loaded,
        tensors,
        shape,
        threads=GraphThreads(device, threads),
        start_layer=start_layer,
        end_layer=end_layer,
        bytes_read=counter.bytes_read,
        weights_note=weights_note,
    )


def _row_bytes(ggml: GgmlCalls, shape: ModelShape, kv_dtype: str) -> int:
    """Bytes of one token's K in one layer."""
    number = KV_TYPE_NUMBERS[kv_dtype]
    if shape.head_dim % ggml.ggml_blck_size(number) or shape.value_dim % ggml.ggml_blck_size(number):
        raise UnsupportedModel(
            f"a KV cache in {kv_dtype} needs a head dimension that is a multiple of {ggml.ggml_blck_size(number)}, and "
            f"this model's is {shape.head_dim}.",
            cure="Leave NOODLE_KV at auto, which is f16.",
        )
    return int(ggml.ggml_row_size(number, shape.head_dim)) * shape.kv_heads


def _with_factors(config: dict[str, Any], maker: WeightMaker, fetch: Fetch) -> dict[str, Any]:
    """The config with the factors of rotary frequencies that a GGUF file holds as tensors, where it names these."""
    named = factor_tensors(config)
    if not named:
        return config
    fetch(list(named.values()))
    factors = {key: [float(value) for value in maker.values(name).reshape(-1)] for key, name in named.items()}
    return {**config, "rope_parameters": {**config["rope_parameters"], **factors}}


def _kept_folder(cache_dir: Path | None, model: Path, weights: str, version: str) -> Path | None:
    if cache_dir is None:
        return None
    ggml = re.sub(r"[^0-9A-Za-z.]+", "-", version).strip("-")
    return cache_dir / "ggml" / f"{model_digest(model)[:16]}-{weights}-{ggml}"


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


def _activation_values(
    shape: ModelShape, blocks: dict[str, WeightBlock], start_layer: int, end_layer: int
) -> tuple[tuple[float, ...], ...]:
    """The numbers of each layer's activation, from the config or from tensors; empty if it has none."""
    if shape.activation_values or not shape.family.activation_values:
        return shape.activation_values[start_layer:end_layer]
    found: list[tuple[float, ...]] = []
    for number in range(start_layer, end_layer):
        block = blocks[str(number)]
        layout = next(each for each in block.tensors if each.name == ACTIVATION_VALUES)
        found.append(tuple(block.bytes_of(layout).view(np.float32).tolist()))
    return tuple(found)


def _query_scales_block(shape: ModelShape) -> WeightBlock:
    """The factor of q at each position, which grows each time that another `growth_length` positions have passed."""
    passed = np.arange(shape.maximum_positions) // shape.growth_length
    scales = (1 + shape.query_growth * np.log1p(passed)).astype(np.float32)
    memory = own_memory(scales.nbytes)
    memory[:] = scales.view(np.uint8)
    return WeightBlock((TensorLayout("scales", 0, (1, shape.maximum_positions), 0, scales.nbytes),), memory)


def _weights(blocks: dict[str, dict[str, int]], shape: ModelShape, start_layer: int, end_layer: int) -> dict[str, Any]:
    embedding = blocks.get("embedding", {}).get("embedding.weight", 0)
    ties_head = end_layer == shape.layer_count and shape.tied
    return {
        "layers": tuple(blocks[str(number)] for number in range(start_layer, end_layer)),
        "embedding": embedding if start_layer == 0 else 0,
        "positions": blocks.get("positions", {}).get("positions.weight", 0),
        "final_norm": blocks.get("final_norm", {}),
        "head": {**({"head.weight": embedding} if ties_head else {}), **blocks.get("head", {})},
        "query_scales": blocks.get("query_scales", {}).get("scales", 0),
        "frequency_factors": tuple(
            blocks["rotary"][str(number - start_layer)] if shape.rotaries[number] is not None else 0
            for number in range(start_layer, end_layer)
        ),
    }
