"""What a quantized matrix offers, and where its tensors are read from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from noodle.errors import ModelNotFound
from noodle.model.tensor_entry import TensorEntry
from services.stage.executors.checkpoints.numbers import Bytes, Floats, to_float16, to_float32


class TensorBytes(Protocol):
    """The tensors of a file, as they are stored."""

    def find(self, key: str) -> TensorEntry | None:
        """Where a tensor lies; None if there is none of this key."""

    def read(self, key: str, first_byte: int, byte_count: int) -> Bytes:
        """Bytes of a tensor from `first_byte` on."""


class Storage(NamedTuple):
    """The type in which ggml holds a matrix."""

    type_name: str  # ggml's, in upper case
    is_exact: bool  # whether it holds the checkpoint's values without rounding


class QuantizedMatrix(ABC):
    """A matrix that several tensors of a file stand for; rows are counted over all dimensions but the last."""

    held: tuple[str, ...] = ()  # names of cached properties with codes and scales

    def __init__(self, files: TensorBytes, key: str, label: str) -> None:
        self._files = files
        self.key = key
        self.label = label  # of its format, for people: AWQ 4 bit
        self._entries: dict[str, TensorEntry] = {}
        self.shape: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Keys of its tensors."""
        return tuple(self._entries)

    @property
    def row_count(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def small_parts(self) -> tuple[str, ...]:
        """Keys of its tensors but the largest, which holds the codes."""
        largest = max(self.parts, key=lambda part: self._found(part).byte_count)
        return tuple(part for part in self.parts if part != largest)

    @cached_property
    def storage(self) -> Storage:
        """The smallest type of ggml that holds the values exactly, otherwise F16 or F32; reads scales."""
        storage = self._storage()
        self.release()  # a model has as many scales as hundredths of its items
        return storage

    @abstractmethod
    def _storage(self) -> Storage: ...

    @abstractmethod
    def rows(self, first: int, count: int) -> Floats:
        """Values [count, row length] from row `first` on."""

    def encoded(self, first: int, count: int, type_name: str) -> Bytes:
        """The same rows as ggml stores them in a type: floats, or the blocks of `storage`."""
        values = self.rows(first, count)
        if type_name == "F16":
            return to_float16(values)
        if type_name == "BF16":
            return (values.view(np.uint32) >> 16).astype("<u2").reshape(-1).view(np.uint8)
        return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)

    def release(self) -> None:
        """Forget codes and scales that were read; they are read again when they are needed."""
        for name in self.held:
            self.__dict__.pop(name, None)

    # its tensors

    def _entry(self, key: str, dtypes: frozenset[str] | set[str]) -> TensorEntry:
        """Entry of a tensor of the matrix; raises ModelNotFound if it is missing or has another dtype."""
        entry = self._files.find(key)
        if entry is None:
            raise self._damage(f"{key} is missing")
        if entry.dtype not in dtypes:
            raise self._damage(f"{key} is stored as {entry.dtype} instead of {' or '.join(sorted(dtypes))}")
        self._entries[key] = entry
        return entry

    def _whole(self, key: str) -> Bytes:
        return self._files.read(key, 0, self._found(key).byte_count)

    def _floats(self, key: str) -> Floats:
        """A whole tensor of floats in its shape; bytes are powers of two."""
        entry = self._found(key)
        values = to_float32(self._whole(key), "F8_E8M0" if entry.dtype == "U8" else entry.dtype)
        if not np.all(np.isfinite(values)):
            raise self._damage(f"{key} holds numbers that are not finite")
        return values.reshape(entry.shape)

    def _found(self, key: str) -> TensorEntry:
        """A tensor that `_entry` has found."""
        return self._entries[key]

    def _check(self, key: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The one of `shapes` that a tensor of floats or integers has; raises ModelNotFound if it has none of them."""
        shape = self._found(key).shape
        if shape not in shapes:
            wanted = " or ".join(str(list(each)) for each in dict.fromkeys(shapes))
            raise self._damage(f"{key} has shape {list(shape)}, but {wanted} is needed")
        return shape

    def _damage(self, reason: str) -> ModelNotFound:
        return ModelNotFound(
            f"the {self.label} weights of {self.key} are not complete or not of this format: {reason}.",
            cure="Fetch the model again, and check that its config.json belongs to its weights.",
        )
