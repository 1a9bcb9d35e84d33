"""Tensors of safetensors files, read directly into torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from noodle.errors import ModelNotFound
from services.stage.executors.base import ReadCounter
from services.stage.executors.checkpoints.folder import QuantizedFolder
from services.stage.executors.safetensors import SafetensorsFolder, unsupported_dtype

# a tensor that is converted is read in pieces, which avoids a second tensor of its size
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
    """A tensor on disk with the interface of transformers' loader: `tensor[...]` reads it.

    A large tensor is read in `dtype`, a small one as stored: transformers keeps some small tensors in float32 whatever
    the dtype of the others.
    """

    def __init__(
        self, folder: SafetensorsFolder | QuantizedFolder, key: str, counter: ReadCounter, dtype: torch.dtype
    ) -> None:
        entry = folder.find(key)
        if entry is None:
            raise ModelNotFound(f"the model lacks the tensor {key}.", cure="Fetch it again.")
        self._folder = folder
        self._entry = entry
        stored_dtype = TORCH_DTYPES.get(self._entry.dtype)
        if stored_dtype is None:
            raise unsupported_dtype(key, self._entry)
        self.key = key
        self.stored_names = folder.stored_names(key)
        self._shape = list(entry.shape)
        self._is_transposed = isinstance(folder, QuantizedFolder) and folder.is_transposed(key)
        self.shape = [*self._shape[:-2], *self._shape[:-3:-1]] if self._is_transposed else self._shape
        self.nbytes = self._entry.byte_count
        self.stored_dtype = stored_dtype
        self._counter = counter
        is_large = self.nbytes > PIECE_BYTES and stored_dtype.is_floating_point
        self._dtype = dtype if is_large else stored_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not Ellipsis:
            raise TypeError(f"a tensor is read as a whole, not {index!r}")
        tensor = torch.empty(self._shape, dtype=self._dtype)
        result = tensor.mT if self._is_transposed else tensor
        flat = tensor.view(-1)
        if self._dtype == self.stored_dtype:
            self._read_into(flat, 0)
            return result
        piece = torch.empty(PIECE_BYTES // self.stored_dtype.itemsize, dtype=self.stored_dtype)
        for start in range(0, len(flat), len(piece)):
            target = flat[start : start + len(piece)]
            self._read_into(piece[: len(target)], start)
            target.copy_(piece[: len(target)])
        return result

    def _read_into(self, flat: torch.Tensor, first_item: int) -> None:
        if not flat.numel():
            return
        buffer = flat.view(torch.uint8).numpy().data
        self._folder.read(self.key, buffer, first_item * self.stored_dtype.itemsize)
        self._counter.add(len(buffer))

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, for transformers."""
        return self._entry.dtype
