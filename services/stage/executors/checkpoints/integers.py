"""Matrices of integers with a scale, and often a zero point, for each group of columns: (q - z) * scale.

Formulas: GPTQ from GPTQModel's `qlinear/__init__.py` (`dequantize_weight`) and AutoGPTQ's format of version 1, whose
stored zero points are one too small; AWQ from AutoAWQ's `utils/packing_utils.py` (`dequantize_gemm`);
compressed-tensors from its `quantization/lifecycle/forward.py` (`dequantize`) and `pack_quantized/helpers.py`;
bitsandbytes' int8 from its `_ops.py` (`int8_vectorwise_dequant`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from services.stage.executors.checkpoints.ggml_blocks import BLOCK_ITEMS, RANGES, exact_type, integer_blocks
from services.stage.executors.checkpoints.matrix import QuantizedMatrix, Storage, TensorBytes
from services.stage.executors.checkpoints.numbers import FLOATS, Bytes, Floats, holds_exactly, nearest_float

Integers = npt.NDArray[np.int16]
WORD_BITS = 32
PACKED_BITS = (2, 4, 8)  # bits of a code of which a word holds a whole number
# the column within a group of 8 that the n-th nibble of a word of AWQ holds
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MOST_PRODUCTS = 1 << 22  # most products of an integer and a scale that are tried for exactness


class Groups(NamedTuple):
    """Scales and zero points [rows, groups] of a matrix."""

    scales: Floats
    zeros: Integers
    size: int  # columns of a group
    of_column: npt.NDArray[np.intp] | None = None  # group of each column, where columns of a group are not neighbours


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> Integers:
    """Codes [..., words * 32 / bits] of words [..., words], the lowest bits first."""
    if bits == 4:
        pairs = np.ascontiguousarray(words).view(np.uint8)
        return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*words.shape[:-1], -1).astype(np.int16)
    if bits == 8:
        return np.ascontiguousarray(words).view(np.uint8).astype(np.int16)
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.int32)
    codes = words[..., None] >> shifts & (1 << bits) - 1
    return codes.reshape(*words.shape[:-1], -1).astype(np.int16)


class IntegerMatrix(QuantizedMatrix):
    """A matrix [rows, columns] of integer codes."""

    least_code = 0
    most_code = 15

    @cached_property
    def groups(self) -> Groups:
        return self._groups()

    @abstractmethod
    def _groups(self) -> Groups:
        """Read scales and zero points."""

    @abstractmethod
    def _codes(self, first: int, count: int) -> Integers:
        """Codes [count, columns] from row `first` on, without their zero points subtracted."""

    def rows(self, first: int, count: int) -> Floats:
        integers, scales = self._integers(first, count), self._rows_of(self.groups.scales, first, count)
        return np.asarray(integers.astype(np.float32) * self._by_column(scales), np.float32)

    def blocks(self, first: int, count: int) -> Bytes:
        if self.storage.type_name not in RANGES:
            return super().blocks(first, count)
        scales = self._rows_of(self.groups.scales, first, count)
        of_blocks = np.repeat(scales, self.groups.size // BLOCK_ITEMS, axis=1)[:, : self.shape[1] // BLOCK_ITEMS]
        return integer_blocks(self.storage.type_name, self._integers(first, count), of_blocks)

    def _storage(self) -> Storage:
        scales, zeros, size, of_column = self.groups
        least, most = self.least_code - int(zeros.max()), self.most_code - int(zeros.min())
        if of_column is None and self.shape[1] % BLOCK_ITEMS == 0 and (name := exact_type(scales, least, most, size)):
            return Storage(name, is_exact=True)
        distinct = np.unique(scales).astype(np.float64)
        if len(distinct) * (most - least + 1) <= MOST_PRODUCTS:
            name = holds_exactly(distinct[:, None] * np.arange(least, most + 1))
            if name in ("F16", "BF16"):
                return Storage(name, is_exact=True)
        largest = float(np.abs(distinct).max(initial=0)) * max(abs(least), abs(most))
        return Storage(nearest_float(largest), is_exact=False)

    def _integers(self, first: int, count: int) -> Integers:
        codes, zeros = self._codes(first, count), self.groups.zeros
        if zeros.size == 1:
            return codes - np.int16(zeros.reshape(-1)[0])
        return np.asarray(codes - self._by_column(self._rows_of(zeros, first, count)), np.int16)

    @staticmethod
    def _rows_of(values: npt.NDArray[Any], first: int, count: int) -> npt.NDArray[Any]:
        return values[first : first + count] if len(values) > 1 else np.broadcast_to(values, (count, values.shape[1]))

    def _by_column(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of each column [rows, columns] from those of its groups."""
        if values.shape[1] == 1:
            return values
        if self.groups.of_column is not None:
            return values[:, self.groups.of_column]
        return np.repeat(values, self.groups.size, axis=1)[:, : self.shape[1]]

    def _words(self, key: str) -> npt.NDArray[np.int32]:
        return self._whole(key).view("<i4").reshape(self._found(key).shape)


class GptqMatrix(IntegerMatrix):
    """GPTQ: `qweight` [columns * bits / 32, rows], `qzeros` [groups, rows * bits / 32], `scales` [groups, rows].

    Group `g_idx`[column] has (code - zero) * scale; without `g_idx`, groups are neighbouring columns. In checkpoint
    format `gptq` the zero point is the stored one plus one, in `gptq_v2` the stored one.
    """

    def __init__(self, files: TensorBytes, key: str, settings: Mapping[str, Any]) -> None:
        self._bits = int(settings["bits"])
        super().__init__(files, key, f"GPTQ {self._bits} bit")
        self._module = key.removesuffix(".weight")
        self._zero_offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        per_word = WORD_BITS // self._bits
        packed = self._entry(f"{self._module}.qweight", {"I32"})
        if len(packed.shape) != 2:
            raise self._damage(f"{self._module}.qweight has shape {list(packed.shape)}")
        columns, rows = packed.shape[0] * per_word, packed.shape[1]
        self.shape, self.most_code = (rows, columns), (1 << self._bits) - 1
        asked = int(settings.get("group_size", -1))
        self._size = columns if asked <= 0 else asked
        groups = -(-columns // self._size)
        self._entry(f"{self._module}.scales", FLOATS)
        self._check(f"{self._module}.scales", (groups, rows))
        self._entry(f"{self._module}.qzeros", {"I32"})
        self._check(f"{self._module}.qzeros", (groups, -(-rows // per_word)))
        if files.find(f"{self._module}.g_idx") is not None:
            self._entry(f"{self._module}.g_idx", {"I32", "I64"})
            self._check(f"{self._module}.g_idx", (columns,))
        self._packed: npt.NDArray[np.int32] | None = None

    def _groups(self) -> Groups:
        rows, columns = self.shape
        scales = np.ascontiguousarray(self._floats(f"{self._module}.scales").T)
        zeros = unpack_words(self._words(f"{self._module}.qzeros"), self._bits)[:, :rows].T + self._zero_offset
        of_column = None
        if f"{self._module}.g_idx" in self.parts:
            entry = self._found(f"{self._module}.g_idx")
            stored = self._whole(f"{self._module}.g_idx").view("<i4" if entry.dtype == "I32" else "<i8")
            if stored.min() < 0 or stored.max() >= scales.shape[1]:
                raise self._damage(f"{self._module}.g_idx names groups outside 0 to {scales.shape[1] - 1}")
            if not np.array_equal(stored, np.arange(columns) // self._size):
                of_column = stored.astype(np.intp)
        return Groups(scales, np.ascontiguousarray(zeros, np.int16), self._size, of_column)

    def _codes(self, first: int, count: int) -> Integers:
        packed = self._packed
        if packed is None:
            packed = self._packed = self._words(f"{self._module}.qweight")
        return unpack_words(np.ascontiguousarray(packed[:, first : first + count].T), self._bits)

    def release(self) -> None:
        self._packed = None


class AwqMatrix(IntegerMatrix):
    """AWQ in its `gemm` layout: `qweight` [columns, rows / 8], `qzeros` [groups, rows / 8], `scales` [groups, rows].

    The n-th nibble of a word belongs to row 8 * word + AWQ_ORDER[n].
    """

    def __init__(self, files: TensorBytes, key: str, settings: Mapping[str, Any]) -> None:
        super().__init__(files, key, "AWQ 4 bit")
        self._module = key.removesuffix(".weight")
        packed = self._entry(f"{self._module}.qweight", {"I32"})
        if len(packed.shape) != 2:
            raise self._damage(f"{self._module}.qweight has shape {list(packed.shape)}")
        columns, rows = packed.shape[0], packed.shape[1] * 8
        self.shape = (rows, columns)
        asked = int(settings.get("group_size", -1))
        self._size = columns if asked <= 0 else asked
        groups = -(-columns // self._size)
        self._entry(f"{self._module}.scales", FLOATS)
        self._check(f"{self._module}.scales", (groups, rows))
        self._entry(f"{self._module}.qzeros", {"I32"})
        self._check(f"{self._module}.qzeros", (groups, rows // 8))
        self._packed: npt.NDArray[np.int32] | None = None

    def _groups(self) -> Groups:
        scales = np.ascontiguousarray(self._floats(f"{self._module}.scales").T)
        return Groups(scales, self._in_order(self._words(f"{self._module}.qzeros")), self._size)

    def _codes(self, first: int, count: int) -> Integers:
        packed = self._packed
        if packed is None:
            packed = self._packed = self._words(f"{self._module}.qweight")
        first_word = first // 8
        words = packed[:, first_word : -(-(first + count) // 8)]
        skipped = first - first_word * 8
        return self._in_order(words)[skipped : skipped + count]

    @staticmethod
    def _in_order(words: npt.NDArray[np.int32]) -> Integers:
        """Codes [rows, columns] of words [columns, rows / 8]."""
        nibbles = unpack_words(words, 4).reshape(*words.shape, 8)
        return np.ascontiguousarray(nibbles[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1).T)

    def release(self) -> None:
        self._packed = None


class PackedMatrix(IntegerMatrix):
    """compressed-tensors' pack-quantized: `weight_packed` [rows, columns * bits / 32] of codes raised by 2^(bits - 1).

    `weight_scale` is [rows, groups], [rows, 1] or one number; `weight_zero_point` [rows * bits / 32, groups] is packed
    along its rows and raised too; `weight_g_idx` names each column's group.
    """

    def __init__(self, files: TensorBytes, key: str, bits: int, group_size: int | None) -> None:
        super().__init__(files, key, f"compressed-tensors int{bits}")
        self._bits = bits
        packed = self._entry(f"{key}_packed", {"I32"})
        self._entry(f"{key}_scale", FLOATS)
        self._entry(f"{key}_shape", {"I64", "I32"})
        self._check(f"{key}_shape", (2,))
        if len(packed.shape) != 2:
            raise self._damage(f"{key}_packed has shape {list(packed.shape)}")
        scales = self._found(f"{key}_scale").shape
        grouped = len(scales) == 2 and scales[1] > 1
        columns = scales[1] * group_size if grouped and group_size else packed.shape[1] * WORD_BITS // bits
        self.shape = (packed.shape[0], columns)
        if -(-columns * bits // WORD_BITS) != packed.shape[1]:
            raise self._damage(
                f"{key}_packed has shape {list(packed.shape)}, which does not fit {columns} columns of {bits} bits"
            )
        self._groups_count = _group_count(self, f"{key}_scale", group_size)
        self._size = columns if self._groups_count == 1 else int(group_size or columns)
        self.least_code, self.most_code = -(1 << bits - 1), (1 << bits - 1) - 1
        if files.find(f"{key}_zero_point") is not None:
            self._entry(f"{key}_zero_point", {"I32"})
            self._check(f"{key}_zero_point", (-(-packed.shape[0] * bits // WORD_BITS), self._groups_count))
        if files.find(f"{key}_g_idx") is not None:
            self._entry(f"{key}_g_idx", {"I32", "I64"})
            self._check(f"{key}_g_idx", (columns,))

    def _groups(self) -> Groups:
        rows, columns = self.shape
        shape_entry = self._found(f"{self.key}_shape")
        said = self._whole(f"{self.key}_shape").view("<i8" if shape_entry.dtype == "I64" else "<i4")
        if tuple(int(size) for size in said) != self.shape:
            raise self._damage(f"{self.key}_shape says {said.tolist()}, but the codes are {list(self.shape)}")
        scales = self._floats(f"{self.key}_scale")
        scales = scales.reshape(-1, self._groups_count)
        zeros = np.zeros((1, 1), np.int16)
        if f"{self.key}_zero_point" in self.parts:
            words = np.ascontiguousarray(self._words(f"{self.key}_zero_point").T)
            zeros = np.ascontiguousarray(unpack_words(words, self._bits)[:, :rows].T) + np.int16(self.least_code)
        of_column = None
        if f"{self.key}_g_idx" in self.parts:
            entry = self._found(f"{self.key}_g_idx")
            stored = self._whole(f"{self.key}_g_idx").view("<i4" if entry.dtype == "I32" else "<i8")
            is_set = stored.min() >= 0  # all are -1 where columns are in their order
            if is_set and stored.max() >= self._groups_count:
                raise self._damage(f"{self.key}_g_idx names groups outside 0 to {self._groups_count - 1}")
            if is_set and not np.array_equal(stored, np.arange(columns) // self._size):
                of_column = stored.astype(np.intp)
        return Groups(scales, zeros, self._size, of_column)

    def _codes(self, first: int, count: int) -> Integers:
        words_per_row = self._found(f"{self.key}_packed").shape[1]
        row_bytes = words_per_row * 4
        data = self._files.read(f"{self.key}_packed", first * row_bytes, count * row_bytes)
        words = data.view("<i4").reshape(count, words_per_row)
        return unpack_words(words, self._bits)[:, : self.shape[1]] + np.int16(self.least_code)


class Int8Matrix(IntegerMatrix):
    """Codes of one byte [rows, columns] with `weight_scale` and, if asymmetric, `weight_zero_point`."""

    least_code, most_code = -128, 127

    def __init__(self, files: TensorBytes, key: str, group_size: int | None) -> None:
        super().__init__(files, key, "compressed-tensors int8")
        self.shape = self._entry(key, {"I8"}).shape
        if len(self.shape) != 2:
            raise self._damage(f"{key} has shape {list(self.shape)}")
        self._entry(f"{key}_scale", FLOATS)
        self._groups_count = _group_count(self, f"{key}_scale", group_size)
        self._size = self.shape[1] if self._groups_count == 1 else int(group_size or self.shape[1])
        if files.find(f"{key}_zero_point") is not None:
            self._entry(f"{key}_zero_point", {"I8"})
            self._check(f"{key}_zero_point", self._found(f"{key}_scale").shape)

    def _groups(self) -> Groups:
        scales = self._floats(f"{self.key}_scale").reshape(-1, self._groups_count)
        zeros = np.zeros((1, 1), np.int16)
        if f"{self.key}_zero_point" in self.parts:
            stored = self._whole(f"{self.key}_zero_point").view(np.int8)
            zeros = stored.reshape(-1, self._groups_count).astype(np.int16)
        return Groups(scales, zeros, self._size)

    def _codes(self, first: int, count: int) -> Integers:
        columns = self.shape[1]
        data = self._files.read(self.key, first * columns, count * columns)
        return data.view(np.int8).reshape(count, columns).astype(np.int16)


class BitsAndBytesInt8Matrix(Int8Matrix):
    """bitsandbytes' LLM.int8(): codes [rows, columns] with the largest magnitude `SCB` of each row: q * SCB / 127."""

    def __init__(self, files: TensorBytes, key: str) -> None:
        IntegerMatrix.__init__(self, files, key, "bitsandbytes int8")
        self.shape = self._entry(key, {"I8"}).shape
        if len(self.shape) != 2:
            raise self._damage(f"{key} has shape {list(self.shape)}")
        self._largest = f"{key.removesuffix('.weight')}.SCB"
        self._entry(self._largest, FLOATS)
        self._check(self._largest, (self.shape[0],))

    def _groups(self) -> Groups:
        scales = self._floats(self._largest) * np.float32(1 / 127)
        return Groups(scales.reshape(-1, 1), np.zeros((1, 1), np.int16), self.shape[1])


def _group_count(matrix: IntegerMatrix, key: str, group_size: int | None) -> int:
    """Groups of a row by the shape of the scales: one for a row or the matrix, otherwise columns / group size."""
    rows, columns = matrix.shape
    groups = -(-columns // group_size) if group_size and group_size > 0 else 1
    shape = matrix._check(key, (rows, groups), (rows, 1), (rows,), (1,), (1, 1), ())
    return shape[1] if len(shape) == 2 else 1
