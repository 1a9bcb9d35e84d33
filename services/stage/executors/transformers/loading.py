"""Makes a slice from a model folder, reading its own tensors and no others; knows keys and families, not steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from noodle.errors import ModelNotFound, PlanDoesNotFit
from noodle.model.families import check_supported
from services.stage.executors.reading import Fetch, Progress, ReadCounter, ignore_progress, nothing_to_fetch
from services.stage.executors.transformers import attention
from services.stage.executors.transformers.model_cut import cut_class, layer_list_name
from services.stage.executors.transformers.rotary import fix_rotary
from services.stage.executors.transformers.slice import TransformersSlice
from services.stage.executors.transformers.small_batch import choose_ways
from services.stage.executors.transformers.weight_files import LazyTensor, WeightFiles


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, checked to be of a model that noodle runs."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFound(f"{path} can not be read: {error.strerror}.", cure="A model folder needs it.") from error
    except ValueError as error:
        raise ModelNotFound(f"{path} is not JSON: {error}.", cure="Fetch it again.") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"{path} is not an object.", cure="Fetch it again.")
    check_supported(config)
    return config


def load_slice(
    folder: Path,
    start_layer: int,
    end_layer: int,
    *,
    device: str,
    dtype: str,
    context_length: int,
    kv_budget_bytes: int | None = None,
    progress: Progress = ignore_progress,
    fetch: Fetch = nothing_to_fetch,
) -> TransformersSlice:
    """Layers [start_layer, end_layer) of the model in `folder`, with embeddings or head when they are at an end.

    `dtype` is float32, float16 or bfloat16. Reads the tensors it computes with and no other bytes; `bytes_read` of
    what comes back says how many. `progress` gets bytes done and in all, from several threads. Before the first byte is
    read, `fetch` gets the keys of the tensors that will be, to bring those that are not in the folder yet.
    Raises ModelNotFound, UnsupportedModel, or PlanDoesNotFit for layers that the model has not.
    """
    read_config(folder)
    weights = WeightFiles(folder)
    attention.register()
    _silence_transformers()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layer_count = int(config.num_hidden_layers)
    if not 0 <= start_layer < end_layer <= layer_count:
        raise PlanDoesNotFit(
            f"layers {start_layer} to {end_layer} were asked for, but {folder} has {layer_count}.",
            cure="Make the split add up to the model's layers.",
        )
    counter = ReadCounter(progress)
    model_class = cut_class(config, start_layer, end_layer)
    with torch.device("meta"):
        described = model_class(_copy(config))
    in_layers = re.compile(rf"^((?:.+\.)?{re.escape(layer_list_name(described))}\.)(\d+)(\..+)$")
    state = _state_of_slice(described, in_layers, weights, counter, getattr(torch, dtype), start_layer, end_layer)
    fetch([tensor.key for tensor in state.values()])
    try:
        model, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.IMPLEMENTATION,
            ignore_mismatched_sizes=True,  # refused by _check_loading, with the file's names
            output_loading_info=True,
            local_files_only=True,
        )
        _check_loading(loading, in_layers, start_layer, config.model_type, folder)
        fix_rotary(model, context_length)
        model.requires_grad_(False).to(device)
        choose_ways(model)
    except torch.OutOfMemoryError as error:
        raise PlanDoesNotFit(
            f"{device} has not the memory for layers {start_layer} to {end_layer} ({counter.total_bytes} bytes).",
            cure="Give this stage fewer layers (NOODLE_SPLIT), or free memory on its machine.",
        ) from error
    except RuntimeError as error:
        raise ModelNotFound(
            f"the weights in {folder} can not be loaded: {error}.", cure="Fetch the folder again."
        ) from error
    return TransformersSlice(
        model,
        start_layer=start_layer,
        end_layer=end_layer,
        layer_count=layer_count,
        device=device,
        bytes_read=counter.bytes_read,
        kv_budget_bytes=kv_budget_bytes,
    )


def _copy(config: Any) -> Any:
    return type(config).from_dict(config.to_dict())


def _silence_transformers() -> None:
    """Its bars and warnings would tear noodle's own; what matters of them becomes an error here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _state_of_slice(
    model: Any,
    in_layers: re.Pattern[str],
    weights: WeightFiles,
    counter: ReadCounter,
    dtype: torch.dtype,
    start_layer: int,
    end_layer: int,
) -> dict[str, LazyTensor]:
    """The tensors a cut model computes with, by the keys they have in it; files of no use to it are not opened.

    Keys of its layers are renumbered from 0; what they become beyond that is transformers' to say, and so is which
    of the other keys belong to which of the model's tensors.
    """
    wanted = set(model.state_dict())
    tied = model.tied_keys_of_whole_model
    name_in_model = _names_in_model(model, wanted | set(tied.values()))
    state: dict[str, LazyTensor] = {}
    for key in weights.file_by_key:
        match = in_layers.match(key)
        if match is None:
            if name_in_model(key) in wanted:
                state[key] = weights.lazy(key, counter, dtype)
        elif start_layer <= int(match[2]) < end_layer:
            state[f"{match[1]}{int(match[2]) - start_layer}{match[3]}"] = weights.lazy(key, counter, dtype)
    if start_layer > 0:
        # where a model ties its head to its embeddings, the last stage reads the embeddings as its own head
        present = {name_in_model(key) for key in state}
        heads = {source: target for target, source in tied.items() if target in wanted and target not in present}
        for key in weights.file_by_key:
            head = heads.get(name_in_model(key))
            if head is not None:
                state[head] = weights.lazy(key, counter, dtype)
    counter.total_bytes = sum(tensor.nbytes for tensor in state.values())
    return state


def _names_in_model(model: Any, known: set[str]) -> Callable[[str], str]:
    """How transformers' loader renames a checkpoint's key for this model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_name = dict.fromkeys(known, True)

    def name_in_model(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, by_name)
        return str(renamed)

    return name_in_model


def _check_loading(
    loading: dict[str, Any], in_layers: re.Pattern[str], start_layer: int, model_type: str, folder: Path
) -> None:
    """Refuse weights that transformers would have filled up at random or left out with a warning."""
    problems = {
        "lack": loading["missing_keys"],
        "hold in another shape": {str(key) for key, *_ in loading["mismatched_keys"]},
        # outside the layers they are other stages' business
        "hold beside those": {key for key in loading["unexpected_keys"] if in_layers.match(key)},
    }
    for problem, keys in problems.items():
        if keys:
            first = in_layers.sub(lambda match: f"{match[1]}{int(match[2]) + start_layer}{match[3]}", min(keys))
            raise ModelNotFound(
                f"the weights in {folder} are not those of its {model_type} config: they {problem} {len(keys)} of this "
                f"slice's tensors, as {first}.",
                cure="Fetch the folder again, and see that config and weights are of the same model.",
            )
