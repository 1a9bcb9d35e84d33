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

Integers = npt.NDArray[np.int8] | npt.NDArray[np.int16]
Zeros = npt.NDArray[np.int16]
WORD_BITS, SIGN_BIT = 32, 128
# the column within a group of 8 that the n-th nibble of a word of AWQ holds
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MOST_PRODUCTS = 1 << 22  # most products of an integer and a scale that are tried for exactness


class Groups(NamedTuple):
    """Scales and zero points [rows, groups] of a matrix."""

    scales: Floats
    zeros: Zeros
    size: int  # columns of a group
    of_column: npt.NDArray[np.intp] | None = None  # group of each column, where columns of a group are not neighbours


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> Bytes:
    """Codes [..., words * 32 / bits] of words [..., words], the lowest bits first."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape, 8 // bits), np.uint8)
    for number in range(8 // bits):
        codes[..., number] = packed >> number * bits & (1 << bits) - 1
    return codes.reshape(*packed.shape[:-1], -1)


class IntegerMatrix(QuantizedMatrix):
    """A matrix [rows, columns] of codes from 0 to 2^bits - 1."""

    held = ("groups", "_packed")
    bits = 4

    @cached_property
    def groups(self) -> Groups:
        groups = self._groups()
        if groups.zeros.min() == groups.zeros.max():
            return groups._replace(zeros=groups.zeros[:1, :1])
        return groups

    @abstractmethod
    def _groups(self) -> Groups:
        """Read scales and zero points."""

    @abstractmethod
    def _codes(self, first: int, count: int) -> Bytes:
        """Codes [count, columns] from row `first` on, from which their zero points are not subtracted yet."""

    def rows(self, first: int, count: int) -> Floats:
        values = self._integers(first, count).astype(np.float32)
        with np.errstate(over="ignore"):  # of scales near float32's end, for which the values are infinite
            return self._by_group(np.multiply, values, self._rows_of(self.groups.scales, first, count))

    def encoded(self, first: int, count: int, type_name: str) -> Bytes:
        if type_name not in RANGES:
            return super().encoded(first, count, type_name)
        scales = self._rows_of(self.groups.scales, first, count)
        count_of_blocks = self.shape[1] // BLOCK_ITEMS
        of_blocks = np.repeat(scales, self.groups.size // BLOCK_ITEMS, axis=1)[:, :count_of_blocks]
        of_rows = np.broadcast_to(of_blocks, (count, count_of_blocks))
        return integer_blocks(type_name, self._integers(first, count), of_rows)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """Bounds of codes minus zero points."""
        return -int(self.groups.zeros.max()), (1 << self.bits) - 1 - int(self.groups.zeros.min())

    def _storage(self) -> Storage:
        (least, most), scales = self._range, self.groups.scales
        is_in_order = self.groups.of_column is None and self.shape[1] % BLOCK_ITEMS == 0
        if is_in_order and (name := exact_type(scales, least, most, self.groups.size)):
            return Storage(name, is_exact=True)
        distinct = np.unique(scales).astype(np.float64)
        if len(distinct) * (most - least + 1) <= MOST_PRODUCTS:
            name = holds_exactly(distinct[:, None] * np.arange(least, most + 1))
            if name in ("F16", "BF16"):
                return Storage(name, is_exact=True)
        largest = float(np.abs(distinct).max(initial=0)) * max(abs(least), abs(most))
        return Storage(nearest_float(largest), is_exact=False)

    def _integers(self, first: int, count: int) -> Integers:
        codes, zeros = self._codes(first, count), self._rows_of(self.groups.zeros, first, count)
        least, most = self._range
        if least < -128 or most > 127:
            return self._by_group(np.subtract, codes.astype(np.int16), zeros)
        # bytes wrap around to the right difference
        return self._by_group(np.subtract, codes, zeros.astype(np.uint8)).view(np.int8)

    @staticmethod
    def _rows_of(values: npt.NDArray[Any], first: int, count: int) -> npt.NDArray[Any]:
        return values[first : first + count] if len(values) > 1 else values

    def _by_group(self, operation: np.ufunc, items: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`items` [rows, columns] after an operation with the value of their group [rows, groups], in place."""
        if self.groups.of_column is not None:
            values = np.take(values, self.groups.of_column, axis=1) if values.shape[1] > 1 else values
        elif values.shape[1] > 1:
            if items.shape[1] == values.shape[1] * self.groups.size:
                of_groups = items.reshape(len(items), values.shape[1], self.groups.size)
                operation(of_groups, values[..., None], out=of_groups)
                return items
            values = np.repeat(values, self.groups.size, axis=1)[:, : items.shape[1]]
        operation(items, values, out=items)
        return items

    def _check_matrix(self, key: str) -> None:
        shape = self._found(key).shape
        if len(shape) != 2 or min(shape) < 1:
            raise self._damage(f"{key} has shape {list(shape)}, which is no matrix")

    def _words(self, key: str) -> npt.NDArray[np.int32]:
        return self._whole(key).view("<i4").reshape(self._found(key).shape)

    def _order(self, key: str, groups: int, size: int) -> npt.NDArray[np.intp] | None:
        """Group of each column from a tensor of them; None if groups are neighbours, or if all are -1."""
        stored = self._whole(key).view("<i4" if self._found(key).dtype == "I32" else "<i8")
        if np.all(stored == -1) or np.array_equal(stored, np.arange(len(stored)) // size):
            return None
        if stored.min() < 0 or stored.max() >= groups:
            raise self._damage(f"{key} names groups outside 0 to {groups - 1}")
        return stored.astype(np.intp)


class InputFirstMatrix(IntegerMatrix):
    """What GPTQ and AWQ share: codes in words of `qweight`, whose first axis is that of the inputs.

    `scales` are [groups, rows], `qzeros` are packed along the rows: [groups, rows / codes of a word].
    """

    def __init__(self, files: TensorBytes, key: str, label: str) -> None:
        super().__init__(files, key, label)
        self._module = key.removesuffix(".weight")

    def _packed_shape(self) -> tuple[int, int]:
        """Find `qweight`; returns its shape in words."""
        key = f"{self._module}.qweight"
        packed = self._entry(key, {"I32"})
        self._check_matrix(key)
        return packed.shape[0], packed.shape[1]

    def _find_groups(self, rows: int, columns: int, settings: Mapping[str, Any]) -> None:
        """Set the matrix's shape and its groups' size; find scales and zero points of that shape."""
        self.shape = (rows, columns)
        asked = int(settings.get("group_size", -1))
        self._size = columns if asked <= 0 else min(asked, columns)
        groups = -(-columns // self._size)
        self._entry(f"{self._module}.scales", FLOATS)
        self._check(f"{self._module}.scales", (groups, rows))
        self._entry(f"{self._module}.qzeros", {"I32"})
        self._check(f"{self._module}.qzeros", (groups, -(-rows * self.bits // WORD_BITS)))

    @cached_property
    def _packed(self) -> npt.NDArray[np.int32]:
        return self._words(f"{self._module}.qweight")


class GptqMatrix(InputFirstMatrix):
    """GPTQ: `qweight` [columns * bits / 32, rows], `qzeros` [groups, rows * bits / 32], `scales` [groups, rows].

    Group `g_idx`[column] has (code - zero) * scale; without `g_idx`, groups are neighbouring columns. In checkpoint
    format `gptq` the zero point is the stored one plus one, in `gptq_v2` the stored one.
    """

    def __init__(self, files: TensorBytes, key: str, settings: Mapping[str, Any]) -> None:
        self.bits = int(settings["bits"])
        super().__init__(files, key, f"GPTQ {self.bits} bit")
        self._zero_offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        words, rows = self._packed_shape()
        columns = words * WORD_BITS // self.bits
        self._find_groups(rows, columns, settings)
        if files.find(f"{self._module}.g_idx") is not None:
            self._entry(f"{self._module}.g_idx", {"I32", "I64"})
            self._check(f"{self._module}.g_idx", (columns,))

    def _groups(self) -> Groups:
        scales = np.ascontiguousarray(self._floats(f"{self._module}.scales").T)
        stored = unpack_words(self._words(f"{self._module}.qzeros"), self.bits)[:, : self.shape[0]]
        zeros = np.ascontiguousarray(stored.T).astype(np.int16) + np.int16(self._zero_offset)
        order = f"{self._module}.g_idx"
        of_column = self._order(order, scales.shape[1], self._size) if order in self.parts else None
        return Groups(scales, zeros, self._size, of_column)

    def _codes(self, first: int, count: int) -> Bytes:
        return unpack_words(self._packed[:, first : first + count].T, self.bits)


class AwqMatrix(InputFirstMatrix):
    """AWQ in its `gemm` layout: `qweight` [columns, rows / 8], `qzeros` [groups, rows / 8], `scales` [groups, rows].

    The n-th nibble of a word belongs to row 8 * word + AWQ_ORDER[n].
    """

    def __init__(self, files: TensorBytes, key: str, settings: Mapping[str, Any]) -> None:
        super().__init__(files, key, "AWQ 4 bit")
        columns, words = self._packed_shape()
        self._find_groups(words * 8, columns, settings)

    def _groups(self) -> Groups:
        scales = np.ascontiguousarray(self._floats(f"{self._module}.scales").T)
        zeros = self._in_order(self._words(f"{self._module}.qzeros"))
        return Groups(scales, zeros.astype(np.int16), self._size)

    def _codes(self, first: int, count: int) -> Bytes:
        first_word = first // 8
        words = self._packed[:, first_word : -(-(first + count) // 8)]
        skipped = first - first_word * 8
        return self._in_order(words)[skipped : skipped + count]

    @staticmethod
    def _in_order(words: npt.NDArray[np.int32]) -> Bytes:
        """Codes [rows, columns] of words [columns, rows / 8]."""
        columns, count = words.shape
        by_row = np.ascontiguousarray(words.T)
        codes = np.empty((count, 8, columns), np.uint8)
        for number, row in enumerate(AWQ_ORDER):
            codes[:, row] = by_row >> 4 * number & 15
        return codes.reshape(-1, columns)


class PackedMatrix(IntegerMatrix):
    """compressed-tensors' pack-quantized: `weight_packed` [rows, columns * bits / 32] of codes raised by 2^(bits - 1).

    `weight_scale` is [rows, groups], [rows, 1] or one number; `weight_zero_point` [rows * bits / 32, groups] is packed
    along its rows and raised too; `weight_g_idx` names each column's group.
    """

    def __init__(self, files: TensorBytes, key: str, bits: int, group_size: int | None) -> None:
        super().__init__(files, key, f"compressed-tensors int{bits}")
        self.bits = bits
        packed = self._entry(f"{key}_packed", {"I32"})
        self._entry(f"{key}_scale", FLOATS)
        self._entry(f"{key}_shape", {"I64", "I32"})
        self._check(f"{key}_shape", (2,))
        self._check_matrix(f"{key}_packed")
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
        if files.find(f"{key}_zero_point") is not None:
            self._entry(f"{key}_zero_point", {"I32"})
            self._check(f"{key}_zero_point", (-(-packed.shape[0] * bits // WORD_BITS), self._groups_count))
        if files.find(f"{key}_g_idx") is not None:
            self._entry(f"{key}_g_idx", {"I32", "I64"})
            self._check(f"{key}_g_idx", (columns,))

    def _groups(self) -> Groups:
        shape_entry = self._found(f"{self.key}_shape")
        said = self._whole(f"{self.key}_shape").view("<i8" if shape_entry.dtype == "I64" else "<i4")
        if tuple(int(size) for size in said) != self.shape:
            raise self._damage(f"{self.key}_shape says {said.tolist()}, but the codes are {list(self.shape)}")
        scales = self._floats(f"{self.key}_scale").reshape(-1, self._groups_count)
        zeros = np.full((1, 1), 1 << self.bits - 1, np.int16)
        if f"{self.key}_zero_point" in self.parts:
            words = np.ascontiguousarray(self._words(f"{self.key}_zero_point").T)
            zeros = np.ascontiguousarray(unpack_words(words, self.bits)[:, : self.shape[0]].T).astype(np.int16)
        order = f"{self.key}_g_idx"
        of_column = self._order(order, self._groups_count, self._size) if order in self.parts else None
        return Groups(scales, zeros, self._size, of_column)

    def _codes(self, first: int, count: int) -> Bytes:
        words_per_row = self._found(f"{self.key}_packed").shape[1]
        row_bytes = words_per_row * 4
        data = self._files.read(f"{self.key}_packed", first * row_bytes, count * row_bytes)
        return unpack_words(data.view("<i4").reshape(count, words_per_row), self.bits)[:, : self.shape[1]]


class Int8Matrix(IntegerMatrix):
    """Codes of one byte [rows, columns] with `weight_scale` and, if asymmetric, `weight_zero_point`."""

    bits = 8

    def __init__(self, files: TensorBytes, key: str, group_size: int | None) -> None:
        super().__init__(files, key, "compressed-tensors int8")
        self.shape = self._entry(key, {"I8"}).shape
        self._check_matrix(key)
        self._entry(f"{key}_scale", FLOATS)
        self._groups_count = _group_count(self, f"{key}_scale", group_size)
        self._size = self.shape[1] if self._groups_count == 1 else int(group_size or self.shape[1])
        if files.find(f"{key}_zero_point") is not None:
            self._entry(f"{key}_zero_point", {"I8"})
            self._check(f"{key}_zero_point", self._found(f"{key}_scale").shape)

    def _groups(self) -> Groups:
        scales = self._floats(f"{self.key}_scale").reshape(-1, self._groups_count)
        zeros = np.full((1, 1), SIGN_BIT, np.int16)
        if f"{self.key}_zero_point" in self.parts:
            stored = self._whole(f"{self.key}_zero_point").view(np.int8)
            zeros = stored.reshape(-1, self._groups_count).astype(np.int16) + np.int16(SIGN_BIT)
        return Groups(scales, zeros, self._size)

    def _codes(self, first: int, count: int) -> Bytes:
        columns = self.shape[1]
        data = self._files.read(self.key, first * columns, count * columns)
        return data.reshape(count, columns) ^ np.uint8(SIGN_BIT)  # from 0 to 255 instead of -128 to 127


class BitsAndBytesInt8Matrix(Int8Matrix):
    """bitsandbytes' LLM.int8(): codes [rows, columns] with the largest magnitude `SCB` of each row: q * SCB / 127."""

    def __init__(self, files: TensorBytes, key: str) -> None:
        IntegerMatrix.__init__(self, files, key, "bitsandbytes int8")
        self.shape = self._entry(key, {"I8"}).shape
        self._check_matrix(key)
        self._largest = f"{key.removesuffix('.weight')}.SCB"
        self._entry(self._largest, FLOATS)
        self._check(self._largest, (self.shape[0],))

    def _groups(self) -> Groups:
        scales = self._floats(self._largest) * np.float32(1 / 127)
        return Groups(scales.reshape(-1, 1), np.full((1, 1), SIGN_BIT, np.int16), self.shape[1])


def _group_count(matrix: IntegerMatrix, key: str, group_size: int | None) -> int:
    """Groups of a row by the shape of the scales: one for a row or the matrix, otherwise columns / group size."""
    rows, columns = matrix.shape
    groups = -(-columns // group_size) if group_size and group_size > 0 else 1
    shape = matrix._check(key, (rows, groups), (rows, 1), (rows,), (1,), (1, 1), ())
    return shape[1] if len(shape) == 2 else 1
