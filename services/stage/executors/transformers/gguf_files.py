"""GGUF files as transformers' checkpoints: the config, and the values that blocks stand for, by transformers' names."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize
from transformers import AutoConfig

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.files import read_config
from noodle.model.ggml_types import GGML_TYPES
from noodle.model.gguf import first_unread, read_gguf
from noodle.model.gguf_config import factor_tensors
from noodle.model.tensor_entry import TensorEntry
from services.stage.executors.base import Fetch, ReadCounter
from services.stage.executors.safetensors import read_into
from services.stage.executors.transformers.gguf_families import GGUF_FAMILIES, only_ggml_computes

PIECE_ITEMS = 1 << 22  # values that are made of blocks at once
SMALL_ITEMS = 1 << 18  # transformers keeps some small tensors in float32 whatever the dtype of the others
REPETITIONS = ("attn_rot_embd", "attn_rope_freqs", "rope_freqs")  # in a layer, of what the header says
OTHER_CURE = "Build ggml (make ggml), which computes more of these files, or use the model's safetensors."

Values = npt.NDArray[np.float32]


class GgufCheckpoint:
    """A GGUF file's config and tensors by transformers' names, which `name_tensors` sets."""

    def __init__(self, path: Path, fetch: Fetch) -> None:
        config = read_config(path)
        if what := only_ggml_computes(path, config):
            raise UnsupportedModel(f"{what}, which transformers does not compute.", cure=OTHER_CURE)
        self._path, self._config = path, config
        self._file = read_gguf(path)
        self._family = GGUF_FAMILIES[self._file.architecture]
        self._stored: dict[str, str] = {}  # transformers' names -> the file's
        rotary = config.get("rope_parameters") or {}
        tensors = {key: name for key, name in factor_tensors(config).items() if name in self._file.entries}
        fetch(list(tensors.values()))
        factors = {key: values_of(self._file.entries[name]) for key, name in tensors.items()}
        # what llama3's parameters lead to; the file does not hold the parameters, which transformers asks for
        self.rotary_factors = factors.pop("factors", None)
        if self.rotary_factors is not None:
            rotary = {key: value for key, value in rotary.items() if key != "factors"} | {"rope_type": "default"}
        config["rope_parameters"] = rotary | {key: values.tolist() for key, values in factors.items()}

    def config(self) -> Any:
        """transformers' config object, with what tensors say that config.json says elsewhere.

        Raises UnsupportedModel for values that transformers refuses.
        """
        entries = self._file.entries
        values = {key: value for key, value in self._config.items() if key != "rope_interleave"}
        values["intermediate_size"] = self._entry("blk.0.ffn_down.weight").shape[-1]
        # the defaults of some families lie outside small vocabularies, and no stage uses them
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        biases = {"attention_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_up"}
        values |= {key: f"blk.0.{name}.bias" in entries for key, name in biases.items()}
        try:
            return AutoConfig.for_model(**values)
        except Exception as error:  # each config's checks raise their own
            raise UnsupportedModel(
                f"transformers refuses the config of {self._path} ({type(error).__name__}: {error}).", cure=OTHER_CURE
            ) from error

    def name_tensors(self, names: Iterable[str], layers: range) -> None:
        """Find tensors by transformers' names; raises UnsupportedModel if these layers hold one without such a name."""
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._file.architecture)
        name_map = gguf.get_tensor_name_map(architecture, layers.stop)
        for name in names:
            stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored in self._file.entries:
                self._stored[name] = stored
        if unread := first_unread(self._file.entries, self._stored.values(), layers, REPETITIONS):
            raise UnsupportedModel(
                f"{self._path} holds the tensor {unread}, and transformers computes such a model without it.",
                cure=OTHER_CURE,
            )

    def names(self) -> list[str]:
        """transformers' names of the tensors that were found."""
        return list(self._stored)

    def tensor(self, name: str, counter: ReadCounter, dtype: torch.dtype) -> GgufTensor:
        """The tensor, to be read in `dtype`."""
        stored = self._stored[name]
        heads = 0
        if self._family.interleaved:
            modules = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
            heads = self._config.get(modules.get(stored.split(".")[-2], ""), 0)
        offset = self._family.norm_offset if name.endswith("norm.weight") else 0.0
        return GgufTensor(name, stored, self._entry(stored), counter, dtype=dtype, heads=heads, offset=offset)

    def _entry(self, stored: str) -> TensorEntry:
        entry = self._file.entries.get(stored)
        if entry is None:
            raise ModelNotFound(f"{self._path} lacks the tensor {stored}.", cure="Fetch it again.")
        return entry


class GgufTensor:
    """A tensor on disk with the interface of transformers' loader: `tensor[...]` reads it.

    A large tensor is made in `dtype`, a small one in float32. `heads` are those whose rows are interleaved, and
    `offset` is subtracted.
    """

    def __init__(
        self,
        key: str,
        stored_name: str,
        entry: TensorEntry,
        counter: ReadCounter,
        *,
        dtype: torch.dtype,
        heads: int,
        offset: float,
    ) -> None:
        self.key, self.stored_names = key, (stored_name,)
        self._entry, self._counter = entry, counter
        self._heads, self._offset = heads, offset
        self._dtype = dtype if math.prod(entry.shape) > SMALL_ITEMS else torch.float32
        self.shape = list(entry.shape)
        self.nbytes = entry.byte_count
        if not _is_read(entry.dtype):
            raise UnsupportedModel(
                f"tensor {stored_name} of {entry.file} is stored as {entry.dtype}, which transformers' executor does "
                "not read.",
                cure=OTHER_CURE,
            )

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not Ellipsis:
            raise TypeError(f"a tensor is read as a whole, not {index!r}")
        result = torch.empty(self.shape, dtype=self._dtype)
        flat = result.view(-1)
        row_items = self.shape[-1]
        rows = max(1, PIECE_ITEMS // row_items)
        for first in range(0, len(flat) // row_items, rows):
            target = flat[first * row_items : (first + rows) * row_items]
            target.copy_(torch.from_numpy(values_of(self._entry, first, len(target) // row_items)).view(-1))
            self._counter.add(GGML_TYPES[self._entry.dtype].byte_count(len(target)))
        if self._offset:
            result -= self._offset
        if self._heads:
            pairs = result.view(self._heads, -1, 2, *self.shape[1:])
            result = pairs.transpose(1, 2).reshape(self.shape)
        return result

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, for transformers."""
        return "F32"


def values_of(entry: TensorEntry, first_row: int = 0, row_count: int | None = None) -> Values:
    """Float32 values of a tensor's rows, all of them if no number is given."""
    row_items = entry.shape[-1]
    row_bytes = GGML_TYPES[entry.dtype].byte_count(row_items)
    count = entry.byte_count // row_bytes if row_count is None else row_count
    rows = np.empty((count, row_bytes), np.uint8)
    read_into(entry, rows.data.cast("B"), first_row * row_bytes)
    values: Values = _dequantized(rows, entry.dtype)
    return values if row_count is not None else values.reshape(entry.shape)


@functools.cache
def _is_read(dtype: str) -> bool:
    """Whether the gguf package reads blocks of a type, which it tells by its error alone."""
    try:
        _dequantized(np.zeros((1, GGML_TYPES[dtype].block_bytes), np.uint8), dtype)
    except NotImplementedError:
        return False
    return True


def _dequantized(rows: npt.NDArray[np.uint8], dtype: str) -> Values:
    kind = gguf.GGMLQuantizationType[dtype]
    plain = {"F32": np.float32, "F16": np.float16}.get(dtype)  # which the package returns as they are given
    values = rows.view(plain) if plain else dequantize(rows, kind)
    return np.ascontiguousarray(values, np.float32)
