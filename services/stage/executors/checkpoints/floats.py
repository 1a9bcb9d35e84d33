"""Matrices of 8 bit floats with scales: value * scale, multiplied in float32.

The formula is that of transformers' `integrations/finegrained_fp8.py` (`Fp8Dequantize`) for DeepSeek's and Qwen's
`weight_scale_inv`, which is a factor despite its name, and for compressed-tensors' float-quantized `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from services.stage.executors.checkpoints.matrix import QuantizedMatrix, Storage, TensorBytes
from services.stage.executors.checkpoints.numbers import (
    FLOATS,
    SMALL_FLOATS,
    Floats,
    holds_exactly,
    nearest_float,
    to_float32,
)

CODES = frozenset({"F8_E4M3", "F8_E5M2"})
SCALES = FLOATS | {"U8"}  # bytes are E8M0
MOST_PRODUCTS = 1 << 22  # most products of a code and a scale that are tried for exactness


class SmallFloatMatrix(QuantizedMatrix):
    """Codes [rows, columns] of E4M3 or E5M2 and their scales: one, one for each row, or one for each block.

    Blocks have `block` rows and columns, of which the last may be cut off by the matrix's end; without it they divide
    the matrix evenly.
    """

    held = ("_scales",)

    def __init__(self, files: TensorBytes, key: str, scale_key: str, block: Sequence[int] | None) -> None:
        super().__init__(files, key, "FP8")
        entry = self._entry(key, CODES)
        self.shape = entry.shape
        self._dtype = entry.dtype
        self._scale_key = scale_key
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise self._damage(f"{key} has shape {list(self.shape)}, which is no matrix")
        self._entry(scale_key, SCALES)
        self._block = self._block_of(scale_key, block)

    def _block_of(self, scale_key: str, block: Sequence[int] | None) -> tuple[int, ...]:
        rows, columns = self.shape[-2:]
        shape = self._found(scale_key).shape
        if len(shape) < 2 or shape[-2:] == (1, 1):
            is_one = shape in ((), (1,), (1, 1), (*self.shape[:-2], 1, 1), self.shape[:-2])
            if is_one:
                return rows, columns
            if shape == (rows,):
                return 1, columns
        if len(shape) == len(self.shape) and shape[:-2] == self.shape[:-2] and min(shape) > 0:
            if block and shape[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
                return tuple(block)
            if shape[-2:] == (rows, 1):
                return 1, columns
            if not block and rows % shape[-2] == 0 and columns % shape[-1] == 0:
                return rows // shape[-2], columns // shape[-1]
        blocks = f" for blocks of {' x '.join(map(str, block))}" if block else ""
        raise self._damage(f"{scale_key} has shape {list(shape)}, which does not fit {list(self.shape)}{blocks}")

    @cached_property
    def _scales(self) -> Floats:
        """Scales [matrices, block rows, block columns]."""
        scales = self._floats(self._scale_key)
        rows, columns = self.shape[-2:]
        return scales.reshape(-1, -(-rows // self._block[0]), -(-columns // self._block[1]))

    def _storage(self) -> Storage:
        codes = SMALL_FLOATS[self._dtype]
        magnitudes = np.abs(codes[np.isfinite(codes)]).astype(np.float64)
        distinct = np.unique(np.abs(self._scales)).astype(np.float64)
        if len(distinct) * len(magnitudes) <= MOST_PRODUCTS:
            name = holds_exactly(np.unique(magnitudes) * distinct[:, None])
            if name in ("F16", "BF16"):
                return Storage(name, is_exact=True)
        return Storage(nearest_float(float(distinct.max(initial=0) * magnitudes.max())), is_exact=False)

    def rows(self, first: int, count: int) -> Floats:
        rows, columns = self.shape[-2:]
        values = to_float32(self._files.read(self.key, first * columns, count * columns), self._dtype)
        values = values.reshape(count, columns)
        numbers = np.arange(first, first + count)
        matrix = numbers // rows if len(self._scales) > 1 else np.zeros(count, np.intp)
        scales = self._scales[matrix, numbers % rows // self._block[0]]
        if scales.shape[1] > 1:
            scales = np.repeat(scales, self._block[1], axis=1)[:, :columns]
        return values * scales
