"""Writes a GGUF's tensors as safetensors with numpy alone; knows quantized blocks and orders of rows, no config.

Quantized tensors become float32: the exact values the quantized ones stand for, and what transformers makes of the same
file, so that every comparison is with the same numbers. Tensors stored as F16 or BF16 keep their bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

CHUNK_ITEMS = 4 << 20  # weight items dequantized at once: bounds memory at some 50 MB beside one q or k tensor
SAFETENSORS_DTYPES = {GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it will stand in the safetensors file."""

    name: str
    dtype: str  # of safetensors: F32, F16 or BF16
    shape: tuple[int, ...]
    source: ReaderTensor
    rotary_heads: int  # heads whose rows must be put back in transformers' order; 0 for all but q and k

    @property
    def byte_count(self) -> int:
        """Bytes in the safetensors file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_dtype(tensor: ReaderTensor) -> str:
    """safetensors' name of the dtype that a tensor of the GGUF is stored as."""
    return SAFETENSORS_DTYPES.get(tensor.tensor_type, "F32")


def write_weights(tensors: Sequence[StoredTensor], path: Path, progress: Callable[[int], None]) -> str:
    """Write the safetensors file, tensor by tensor; returns its sha256. `progress` hears bytes of weights written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.byte_count],
        }
        offset += tensor.byte_count
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8 bytes
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:
        for block in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(block)
            digest.update(block)
        for tensor in tensors:
            for array in _converted_chunks(tensor):
                file.write(array.data)
                digest.update(array.data)
                written += array.nbytes
                progress(written)
    if written != offset:
        raise AssertionError(f"{path}: {written} bytes of weights written, {offset} announced in the header")
    return digest.hexdigest()


def _converted_chunks(tensor: StoredTensor) -> Iterator[npt.NDArray[Any]]:
    """The tensor's items in order, as contiguous arrays of its stored dtype."""
    data = tensor.source.data
    if tensor.rotary_heads:
        yield np.ascontiguousarray(_undo_rotary_permutation(_items(tensor, data), tensor.rotary_heads))
        return
    rows_at_once = max(1, CHUNK_ITEMS // tensor.shape[-1])
    for start in range(0, data.shape[0], rows_at_once if data.ndim > 1 else data.shape[0]):
        yield np.ascontiguousarray(_items(tensor, data[start : start + rows_at_once] if data.ndim > 1 else data))


def _items(tensor: StoredTensor, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if tensor.dtype != "F32":
        return data.view(np.uint16)  # the bits as they are; numpy has no bfloat16
    items: npt.NDArray[np.float32] = dequantize(data, tensor.source.tensor_type).astype(np.float32, copy=False)
    return items


def _undo_rotary_permutation(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """GGUF interleaves the two halves that transformers rotates; put [head, pair, half] back to [head, half, pair]."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
