"""Tensors of a folder of safetensors files as torch reads them, straight to where they stay; knows no model."""

from __future__ import annotations

from typing import Any

import torch

from services.stage.executors.reading import ReadCounter
from services.stage.executors.safetensors import SafetensorsFile, SafetensorsFolder

# a tensor that is converted is read in pieces of this size, so that no second one as large stands beside it
PIECE_BYTES = 1 << 20
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class LazyTensor:
    """A tensor still on disk, in the form transformers' loader asks for: `tensor[...]` reads it.

    Comes in `dtype` when it is large, else as stored: transformers keeps some small tensors in float32 whatever the
    others are in.
    """

    def __init__(self, file: SafetensorsFile, key: str, counter: ReadCounter, dtype: torch.dtype) -> None:
        entry = file.entries[key]
        stored_dtype = TORCH_DTYPES.get(entry["dtype"])
        if stored_dtype is None:
            raise file.not_computed_with(key)
        self.key = key
        self.shape: list[int] = list(entry["shape"])
        self.offset, end = entry["data_offsets"]
        self.nbytes: int = end - self.offset
        self.stored_dtype = stored_dtype
        self._stored_name = str(entry["dtype"])
        self._file = file
        self._counter = counter
        is_large = self.nbytes > PIECE_BYTES and stored_dtype.is_floating_point
        self._dtype = dtype if is_large else stored_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not Ellipsis:
            raise TypeError(f"tensors are read whole, not {index!r}")
        tensor = torch.empty(self.shape, dtype=self._dtype)
        flat = tensor.view(-1)
        if self._dtype == self.stored_dtype:
            self._read_into(flat, 0)
            return tensor
        piece = torch.empty(PIECE_BYTES // self.stored_dtype.itemsize, dtype=self.stored_dtype)
        for start in range(0, len(flat), len(piece)):
            target = flat[start : start + len(piece)]
            self._read_into(piece[: len(target)], start)
            target.copy_(piece[: len(target)])
        return tensor

    def _read_into(self, flat: torch.Tensor, first_item: int) -> None:
        if not flat.numel():
            return
        buffer = flat.view(torch.uint8).numpy().data
        self._file.read_into(buffer, self.offset + first_item * self.stored_dtype.itemsize)
        self._counter.add(len(buffer))

    def get_shape(self) -> list[int]:
        """Shape, as transformers asks for it."""
        return self.shape

    def get_dtype(self) -> str:
        """Dtype by safetensors' name, as transformers asks for it."""
        return self._stored_name


class WeightFiles(SafetensorsFolder):
    """All tensors of a model folder by key; a file is opened when one of its tensors is wanted."""

    def lazy(self, key: str, counter: ReadCounter, dtype: torch.dtype) -> LazyTensor:
        """One tensor, to be read later."""
        return LazyTensor(self.find(key), key, counter, dtype)
