"""Makes a slice that ggml computes from a model folder, reading its own tensors and no others; computes nothing."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from noodle.errors import ConfigurationError, PlanDoesNotFit, UnsupportedModel
from noodle.model.families import check_supported
from noodle.model.files import model_digest, read_config
from services.stage.executors.ggml.attention import own_attention
from services.stage.executors.ggml.backend import load_ggml
from services.stage.executors.ggml.calls import GgmlCalls
from services.stage.executors.ggml.device import CPU, GgmlDevice
from services.stage.executors.ggml.gemm import packed_rows
from services.stage.executors.ggml.gguf import GgufTensors, gguf_in
from services.stage.executors.ggml.layers import INTERLEAVED, NEOX, SliceTensors
from services.stage.executors.ggml.shape import ModelShape, shape_of
from services.stage.executors.ggml.slice import GgmlSlice
from services.stage.executors.ggml.small_batch import dot_counts
from services.stage.executors.ggml.tensor_map import Recipe, Recipes
from services.stage.executors.ggml.weights import TYPE_NUMBERS, Block, GgmlTensors, Placed, WeightMaker, own_memory
from services.stage.executors.reading import Fetch, Progress, ReadCounter, ignore_progress, nothing_to_fetch
from services.stage.executors.safetensors import SafetensorsFolder

log = logging.getLogger(__name__)

WEIGHTS = (*TYPE_NUMBERS, "gguf")
KV_TYPE_NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8}


def load_ggml_slice(
    folder: Path,
    start_layer: int,
    end_layer: int,
    *,
    weights: str,
    kv_dtype: str = "f16",
    context_length: int,
    threads: int,
    device_name: str = CPU,
    kv_budget_bytes: int | None = None,
    progress: Progress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
    cache_dir: Path | None = None,
) -> GgmlSlice:
    """Layers [start_layer, end_layer) of the model in `folder`, with embeddings or head when they are at an end.

    `weights`: a type of `WEIGHTS`, in which matrices are kept and computed with. What is made of the folder's tensors
    is kept in `cache_dir`, and read from there by later starts and other stages of the machine. `gguf` takes the
    tensors of the folder's .gguf file as they are. `device_name` is ggml's own; `threads` count on its CPU alone.
    `progress` gets bytes done and in all; `fetch` gets the keys of the tensors that will be read, before the first is.
    Raises GgmlUnavailable, UnsupportedModel with what ggml lacks for this model, ModelNotFound, or PlanDoesNotFit for
    layers that the model has not.
    """
    if weights not in WEIGHTS:
        raise ConfigurationError(f"weights {weights!r} are none of {', '.join(WEIGHTS)}.", cure="Choose one of these.")
    if kv_dtype not in KV_TYPE_NUMBERS:
        raise ConfigurationError(
            f"a KV cache in {kv_dtype!r} is none of {', '.join(KV_TYPE_NUMBERS)}.", cure="Choose one of these."
        )
    library = load_ggml()
    ggml = GgmlCalls(library.module)
    model_type, shape = _shape_in(folder, context_length)
    if not 0 <= start_layer < end_layer <= shape.layer_count:
        raise PlanDoesNotFit(
            f"layers {start_layer} to {end_layer} were asked for, but {folder} has {shape.layer_count}.",
            cure="Make the split add up to the model's layers.",
        )
    row_bytes = _row_bytes(ggml, shape, kv_dtype)
    counter = ReadCounter(progress)
    pairing = NEOX
    if weights == "gguf":
        path = gguf_in(folder)
        file = GgufTensors(ggml, path, model_type, shape, counter)
        blocks = file.blocks(_wanted(shape, Recipes(shape, file.shape_of_key, str(path)), start_layer, end_layer))
        pairing = INTERLEAVED if file.is_interleaved else NEOX
    else:
        blocks = _from_safetensors(
            ggml, library.version, folder, shape, start_layer, end_layer, weights, counter, fetch, cache_dir
        )
    device = GgmlDevice(ggml, device_name, library.backend(threads, device_name))
    kernels = packed_rows(ggml) if device.is_host else None
    packed: frozenset[tuple[str, str]] = frozenset()
    if kernels is not None:
        # where the embeddings are the head as well, they are read more often as that
        packed = kernels.pack(blocks, also_embedding=end_layer == shape.layer_count and shape.tied)
    blocks["rotary"] = _rotary_block(shape, start_layer, end_layer)
    loaded = GgmlTensors(device, blocks)
    tensors = _tensors(loaded, shape, start_layer, end_layer, weights, KV_TYPE_NUMBERS[kv_dtype], row_bytes, pairing)
    by_kernels = frozenset(loaded.by_block[block][name] for block, name in packed)
    matrices = [*(tensor for layer in tensors.layers for tensor in layer.values()), *tensors.head.values()]
    timed = [tensor for tensor in matrices if tensor not in by_kernels] if device.is_host else []
    counts = dot_counts(device, timed)
    return GgmlSlice(
        device,
        loaded,
        replace(
            tensors,
            dot_counts=counts,
            kernels=kernels,
            packed=by_kernels,
            attention=own_attention(ggml, shape.head_dim, tensors.key_type) if device.is_host else None,
        ),
        shape,
        start_layer=start_layer,
        end_layer=end_layer,
        bytes_read=counter.bytes_read,
        kv_budget_bytes=kv_budget_bytes,
    )


def _shape_in(folder: Path, context_length: int) -> tuple[str, ModelShape]:
    from transformers import AutoConfig  # takes a second

    check_supported(read_config(folder))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return str(config.model_type), shape_of(config, context_length)


def _row_bytes(ggml: GgmlCalls, shape: ModelShape, kv_dtype: str) -> int:
    """Bytes of one token's K in one layer."""
    number = KV_TYPE_NUMBERS[kv_dtype]
    if shape.head_dim % ggml.ggml_blck_size(number):
        raise UnsupportedModel(
            f"a KV cache in {kv_dtype} takes heads of a multiple of {ggml.ggml_blck_size(number)} dimensions, and this "
            f"model's have {shape.head_dim}.",
            cure="Choose f16 for its KV cache.",
        )
    return int(ggml.ggml_row_size(number, shape.head_dim)) * shape.kv_heads


def _wanted(shape: ModelShape, recipes: Recipes, start_layer: int, end_layer: int) -> dict[str, list[Recipe]]:
    """The slice's tensors by block: a layer's number, `embedding`, `positions`, `final_norm`, `head`."""
    wanted: dict[str, list[Recipe]] = {str(number): recipes.layer(number) for number in range(start_layer, end_layer)}
    is_last = end_layer == shape.layer_count
    if start_layer == 0 or (is_last and shape.tied):
        wanted["embedding"] = recipes.embedding()
    if start_layer == 0 and shape.family.positions:
        wanted["positions"] = recipes.positions()
    if is_last:
        wanted["final_norm"] = recipes.final_norm()
        if not shape.tied:
            wanted["head"] = recipes.head()
    return wanted


def _from_safetensors(
    ggml: GgmlCalls,
    version: str,
    folder: Path,
    shape: ModelShape,
    start_layer: int,
    end_layer: int,
    weights: str,
    counter: ReadCounter,
    fetch: Fetch,
    cache_dir: Path | None,
) -> dict[str, Block]:
    files = SafetensorsFolder(folder)

    def shape_of_key(key: str) -> tuple[int, ...] | None:
        return tuple(files.find(key).entries[key]["shape"]) if key in files.file_by_key else None

    wanted = _wanted(shape, Recipes(shape, shape_of_key, str(folder)), start_layer, end_layer)
    kept_folder = None
    if cache_dir is not None:
        named = re.sub(r"[^0-9A-Za-z.]+", "-", version).strip("-")
        kept_folder = cache_dir / "ggml" / f"{model_digest(folder)[:16]}-{weights}-{named}"
    return WeightMaker(ggml, files, counter, kept_folder).blocks(wanted, weights, fetch)


def _rotary_block(shape: ModelShape, start_layer: int, end_layer: int) -> Block:
    """What positions are divided by to be the angles of each pair: the frequencies' inverses."""
    length = shape.head_dim // 2
    layers = end_layer - start_layer
    padded = -(-length // 16) * 16
    memory = own_memory(layers * padded * 4).view(np.float32).reshape(layers, padded)
    placed: list[Placed] = []
    for number in range(layers):
        rotary = shape.rotaries[start_layer + number]
        if rotary is not None:
            memory[number, : len(rotary.frequencies)] = np.float32(1) / rotary.frequencies
        placed.append(Placed(str(number), 0, (length,), number * memory.strides[0], 4 * length))
    return Block(tuple(placed), memory.reshape(-1).view(np.uint8))


def _tensors(
    loaded: GgmlTensors,
    shape: ModelShape,
    start_layer: int,
    end_layer: int,
    weights: str,
    key_type: int,
    row_bytes: int,
    pairing: int,
) -> SliceTensors:
    blocks = loaded.by_block
    embedding = blocks.get("embedding", {}).get("embedding.weight", 0)
    is_last = end_layer == shape.layer_count
    head = {"head.weight": embedding} if is_last and shape.tied else blocks.get("head", {})
    return SliceTensors(
        layers=tuple(blocks[str(number)] for number in range(start_layer, end_layer)),
        embedding=embedding if start_layer == 0 else 0,
        positions=blocks.get("positions", {}).get("positions.weight", 0),
        final_norm=blocks.get("final_norm", {}),
        head=head,
        frequency_factors=tuple(
            blocks["rotary"][str(number - start_layer)] if shape.rotaries[number] is not None else 0
            for number in range(start_layer, end_layer)
        ),
        pairing=pairing,
        key_type=key_type,
        row_bytes=row_bytes,
        exact=weights == "f32",
    )
