"""Reads the tensors of one slice, and no others, from a folder of safetensors; knows files and keys, not steps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from noodle.errors import ModelNotFound, PlanDoesNotFit, UnsupportedModel
from services.stage import packed_attention
from services.stage.families import check_supported
from services.stage.model_cut import cut_class, layer_list_name
from services.stage.model_slice import TransformersSlice
from services.stage.rotary import fix_rotary

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# by safetensors' names; anything else is one byte or less
_STORED_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}

Progress = Callable[[int, int], None]


def ignore_progress(_done_bytes: int, _total_bytes: int) -> None:
    """For callers that show nothing."""


@dataclass
class ReadCounter:
    """Bytes of tensors read from disk so far, told to `progress` with their expected sum."""

    progress: Progress = ignore_progress
    bytes_read: int = 0
    total_bytes: int = 0

    def add(self, read_bytes: int) -> None:
        """Count a tensor that was read."""
        self.bytes_read += read_bytes
        self.progress(self.bytes_read, max(self.total_bytes, self.bytes_read))


class LazyTensor:
    """A tensor still on disk, in the form transformers' loader asks for: `tensor[...]` reads it."""

    def __init__(self, file: Any, key: str, path: Path, counter: ReadCounter) -> None:
        self._slice = file.get_slice(key)
        self.nbytes = math.prod(self.get_shape()) * _STORED_ITEM_BYTES.get(self.get_dtype(), 1)
        self._key = key
        self._path = path
        self._counter = counter

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._slice[index]
        except (SafetensorError, OSError) as error:
            raise ModelNotFound(
                f"tensor {self._key} can not be read from {self._path}: {error}.",
                cure="The file is damaged or cut short: fetch it again.",
            ) from error
        self._counter.add(tensor.nbytes)
        return tensor

    def get_shape(self) -> list[int]:
        """Shape, from the file's header."""
        return list(self._slice.get_shape())

    def get_dtype(self) -> str:
        """Dtype by safetensors' name, from the file's header."""
        return str(self._slice.get_dtype())


@dataclass
class WeightFiles:
    """All tensors of a folder by key, none read yet."""

    folder: Path
    file_by_key: dict[str, Path]
    _open_files: dict[Path, Any] = field(default_factory=dict)

    def lazy(self, key: str, counter: ReadCounter) -> LazyTensor:
        """One tensor, to be read later; raises ModelNotFound when its file does not hold it."""
        path = self.file_by_key[key]
        file = self._open_files.get(path)
        if file is None:
            file = self._open_files[path] = open_weights(path)
        try:
            return LazyTensor(file, key, path, counter)
        except SafetensorError as error:
            raise ModelNotFound(
                f"{self.folder / INDEX_FILE} says that {path.name} holds {key}, but it does not.",
                cure="Index and weights are not of the same model: fetch the folder again.",
            ) from error


def open_weights(path: Path) -> Any:
    """A safetensors file whose header is read and whole; tensors come by reads, never mapped pages.

    Mapped pages would count as this process's memory beside the tensors copied from them.
    """
    if not path.is_file():
        raise ModelNotFound(f"{path.parent} lacks {path.name}, which its index names.", cure="Fetch the missing file.")
    try:
        return safe_open(path, framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelNotFound(
            f"{path} is not a whole safetensors file: {error}.", cure="It is damaged or cut short: fetch it again."
        ) from error


def find_weights(folder: Path) -> WeightFiles:
    """The tensors of a model folder by key, from its index or its one file."""
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is not a folder.", cure="Set NOODLE_MODEL to a model folder or a model's name.")
    index_path, single_path = folder / INDEX_FILE, folder / SINGLE_FILE
    if index_path.is_file():
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            file_by_key = {str(key): folder / Path(name).name for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ModelNotFound(
                f"{index_path} is not an index of weights: {error!r}.", cure="Fetch it again."
            ) from error
        return WeightFiles(folder, file_by_key)
    if single_path.is_file():
        return WeightFiles(folder, dict.fromkeys(open_weights(single_path).keys(), single_path))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedModel(
            f"{folder} holds its weights as pickle only ({', '.join(pickles[:3])}), and unpickling runs whatever code "
            "is in the file.",
            cure="Take the model's safetensors version, or convert it where you trust the file.",
        )
    raise ModelNotFound(f"{folder} holds no weights.", cure=f"It needs {SINGLE_FILE}, or {INDEX_FILE} and its files.")


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
) -> TransformersSlice:
    """Layers [start_layer, end_layer) of the model in `folder`, with embeddings or head when they are at an end.

    `dtype` is float32, float16 or bfloat16. Reads the tensors it computes with and no other bytes; `bytes_read` of
    what comes back says how many. `progress` gets bytes done and in all, from several threads.
    Raises ModelNotFound, UnsupportedModel, or PlanDoesNotFit for layers that the model has not.
    """
    read_config(folder)
    weights = find_weights(folder)
    packed_attention.register()
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
    state = _state_of_slice(described, weights, counter, start_layer, end_layer)
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype),
        attn_implementation=packed_attention.IMPLEMENTATION,
        output_loading_info=True,
        local_files_only=True,
    )
    _check_loading(loading, config.model_type, folder)
    fix_rotary(model, context_length)
    model.requires_grad_(False).to(device)
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
    model: Any, weights: WeightFiles, counter: ReadCounter, start_layer: int, end_layer: int
) -> dict[str, LazyTensor]:
    """The tensors a cut model computes with, by the keys they have in it; files of no use to it are not opened.

    Keys of its layers are renumbered from 0; what they become beyond that is transformers' to say, and so is which
    of the other keys belong to which of the model's tensors.
    """
    in_layers = re.compile(rf"^((?:.+\.)?{re.escape(layer_list_name(model))}\.)(\d+)(\..+)$")
    wanted = set(model.state_dict())
    tied = model.tied_keys_of_whole_model
    name_in_model = _names_in_model(model, wanted | set(tied.values()))
    state: dict[str, LazyTensor] = {}
    for key in weights.file_by_key:
        match = in_layers.match(key)
        if match is None:
            if name_in_model(key) in wanted:
                state[key] = weights.lazy(key, counter)
        elif start_layer <= int(match[2]) < end_layer:
            state[f"{match[1]}{int(match[2]) - start_layer}{match[3]}"] = weights.lazy(key, counter)
    if start_layer > 0:
        # where a model ties its head to its embeddings, the last stage reads the embeddings as its own head
        present = {name_in_model(key) for key in state}
        heads = {source: target for target, source in tied.items() if target in wanted and target not in present}
        for key in weights.file_by_key:
            head = heads.get(name_in_model(key))
            if head is not None:
                state[head] = weights.lazy(key, counter)
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


def _check_loading(loading: dict[str, Any], model_type: str, folder: Path) -> None:
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise ModelNotFound(
            f"{folder} lacks {len(names)} tensors that a {model_type} model needs: {', '.join(names[:3])}.",
            cure="Config and weights are not of the same model, or files are missing: fetch the folder again.",
        )
