"""Loads a slice that transformers computes, reading only the slice's own tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from noodle.errors import ModelNotFound, PlanDoesNotFit, UnsupportedModel
from noodle.model.formats import FORMAT_BY_DTYPE
from services.stage.executors.base import Fetch, ReadCounter, ReadProgress, ignore_progress, nothing_to_fetch
from services.stage.executors.checkpoints.folder import QuantizedFolder
from services.stage.executors.safetensors import SafetensorsFolder
from services.stage.executors.tensor_files import open_folder
from services.stage.executors.transformers import attention
from services.stage.executors.transformers.gguf_files import GgufCheckpoint, GgufTensor
from services.stage.executors.transformers.linear import choose_gemm_layouts
from services.stage.executors.transformers.model_cut import cut_class, layer_list_name
from services.stage.executors.transformers.rotary import divide_frequencies, fix_rotary
from services.stage.executors.transformers.runtime import read_model_config
from services.stage.executors.transformers.slice import TransformersSlice
from services.stage.executors.transformers.weight_files import LazyTensor

log = logging.getLogger(__name__)

AnyFiles = SafetensorsFolder | QuantizedFolder | GgufCheckpoint
Tensor = LazyTensor | GgufTensor


def load_slice(
    folder: Path,
    start_layer: int,
    end_layer: int,
    *,
    device: str,
    dtype: str,
    context_length: int,
    progress: ReadProgress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
) -> TransformersSlice:
    """Load layers [start_layer, end_layer) of `folder`, or of a GGUF file, with embeddings and head at the ends.

    `dtype` is float32, float16 or bfloat16. Only the slice's tensors are read; the slice's `bytes_read` counts them.
    Several threads call `progress`; `fetch` is called before the first tensor is read.
    Raises ModelNotFound, UnsupportedModel, or PlanDoesNotFit for layers that the model does not have.
    """
    # progress bars and warnings would garble noodle's log; what matters of them is an error here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if folder.is_file():
        files: AnyFiles = GgufCheckpoint(folder, fetch)
    else:
        files = open_folder(folder, as_float32=True, fetch=fetch)
    config = files.config() if isinstance(files, GgufCheckpoint) else read_model_config(folder)
    attention.register()
    layer_count = int(config.num_hidden_layers)
    if not 0 <= start_layer < end_layer <= layer_count:
        raise PlanDoesNotFit(
            f"layers {start_layer} to {end_layer} were requested, but {folder} has {layer_count}.",
            cure="Make the split add up to the model's layers.",
        )
    counter = ReadCounter(progress)
    model_class = cut_class(config, start_layer, end_layer)
    described = _described(model_class, config, folder)
    in_layers = re.compile(rf"^((?:.+\.)?{re.escape(layer_list_name(described))}\.)(\d+)(\..+)$")
    if isinstance(files, GgufCheckpoint):
        wanted = {*described.state_dict(), *described.tied_keys_of_whole_model.values()}
        layers = range(start_layer, end_layer)
        files.name_tensors([_renumbered(in_layers, name, start_layer) for name in wanted], layers)
        lazy: Callable[[str], Tensor] = partial(files.tensor, counter=counter, dtype=getattr(torch, dtype))
    else:
        lazy = partial(LazyTensor, files, counter=counter, dtype=getattr(torch, dtype))
    state = _state_of_slice(described, in_layers, files, lazy, range(start_layer, end_layer))
    counter.total_bytes = sum(tensor.nbytes for tensor in state.values())
    fetch([name for tensor in state.values() for name in tensor.stored_names])
    try:
        model, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.IMPLEMENTATION,
            ignore_mismatched_sizes=True,  # refused by _check_loading, which names the file
            output_loading_info=True,
            local_files_only=True,
        )
        _check_loading(loading, in_layers, start_layer, config.model_type, folder)
        fix_rotary(model, context_length)
        if isinstance(files, GgufCheckpoint) and files.rotary_factors is not None:
            divide_frequencies(model, files.rotary_factors)
        model.requires_grad_(False).to(device)
        choose_gemm_layouts(model)
    except torch.OutOfMemoryError as error:
        raise PlanDoesNotFit(
            f"{device} has no memory for layers {start_layer} to {end_layer} ({counter.total_bytes} bytes).",
            cure="Give this stage fewer layers (NOODLE_SPLIT), or free memory on its machine.",
        ) from error
    except RuntimeError as error:
        raise ModelNotFound(
            f"the weights in {folder} cannot be loaded: {error}.", cure="Fetch the folder again."
        ) from error
    weights_note = ""
    if isinstance(files, QuantizedFolder):
        names = [tensor.key for tensor in state.values()]
        weights_note = files.description(names, held_in=FORMAT_BY_DTYPE[dtype])
    if weights_note:
        log.info("layers %d to %d of %s: %s", start_layer, end_layer - 1, folder.name, weights_note)
    return TransformersSlice(
        model,
        start_layer=start_layer,
        end_layer=end_layer,
        layer_count=layer_count,
        device=device,
        bytes_read=counter.bytes_read,
        weights_note=weights_note,
    )


def _state_of_slice(
    model: Any,
    in_layers: re.Pattern[str],
    files: AnyFiles,
    lazy: Callable[[str], Tensor],
    layers: range,
) -> dict[str, Tensor]:
    """The tensors of a cut model by their keys in it; files that it does not need are not opened.

    Layers are renumbered from 0; all other renaming is transformers'.
    """
    wanted = set(model.state_dict())
    tied = model.tied_keys_of_whole_model
    name_in_model = _names_in_model(model, wanted | set(tied.values()))
    state: dict[str, Tensor] = {}
    for key in files.names():
        match = in_layers.match(key)
        if match is None:
            if name_in_model(key) in wanted:
                state[key] = lazy(key)
        elif int(match[2]) in layers:
            state[_renumbered(in_layers, key, -layers.start)] = lazy(key)
    if layers.start > 0:
        # the last stage of a model with tied embeddings reads them as its head
        present = {name_in_model(key) for key in state}
        heads = {source: target for target, source in tied.items() if target in wanted and target not in present}
        for key in files.names():
            head = heads.get(name_in_model(key))
            if head is not None:
                state[head] = lazy(key)
    return state


def _renumbered(in_layers: re.Pattern[str], name: str, by: int) -> str:
    """The name with its layer's number, if it has one, changed by `by`."""
    return in_layers.sub(lambda match: f"{match[1]}{int(match[2]) + by}{match[3]}", name)


def _names_in_model(model: Any, known: set[str]) -> Callable[[str], str]:
    """How transformers' loader renames a checkpoint's keys for this model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_name = dict.fromkeys(known, True)

    def name_in_model(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, by_name)
        return str(renamed)

    return name_in_model


def _described(model_class: Any, config: Any, folder: Path) -> Any:
    """The model of a config without weights; raises UnsupportedModel for values that its code does not know."""
    try:
        with torch.device("meta"):
            return model_class(type(config).from_dict(config.to_dict()))
    except Exception as error:  # each model's code raises its own
        described_in = folder if folder.is_file() else folder / "config.json"
        raise UnsupportedModel(
            f"transformers cannot build the model that {described_in} describes ({type(error).__name__}: {error}).",
            cure="Fetch the model again. If it is complete, it needs a newer noodle.",
        ) from error


def _check_loading(
    loading: dict[str, Any], in_layers: re.Pattern[str], start_layer: int, model_type: str, folder: Path
) -> None:
    """Refuse weights that transformers would initialize at random or skip with a warning."""
    problems = {
        "lack": loading["missing_keys"],
        "hold in another shape": {str(key) for key, *_ in loading["mismatched_keys"]},
        # keys outside the layers belong to other stages
        "hold beside those": {key for key in loading["unexpected_keys"] if in_layers.match(key)},
    }
    for problem, keys in problems.items():
        if keys:
            first = _renumbered(in_layers, min(keys), start_layer)
            raise ModelNotFound(
                f"the weights in {folder} are not those of its {model_type} config: they {problem} {len(keys)} of this "
                f"slice's tensors, as {first}.",
                cure="Fetch the folder again, and check that config and weights belong to the same model.",
            )
