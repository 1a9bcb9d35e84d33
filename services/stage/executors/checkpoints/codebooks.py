"""Matrices of 4 bit codes that number the values of a small table, times a scale for each run of items.

Formulas: bitsandbytes' from its `functional.py` (`dequantize_4bit`, `QuantState.from_dict`, `dequantize_blockwise`);
MXFP4 from the OCP Microscaling Formats specification 1.0 and transformers' `integrations/mxfp4.py`
(`convert_moe_packed_tensors`).
"""

from __future__ import annotations

import math
from functools import cached_property

import msgspec
import numpy as np

from services.stage.executors.checkpoints.ggml_blocks import BLOCK_ITEMS, mxfp4_blocks
from services.stage.executors.checkpoints.matrix import QuantizedMatrix, Storage, TensorBytes
from services.stage.executors.checkpoints.numbers import FLOATS, SMALL_FLOATS, Bytes, Floats, nearest_float

TYPES = ("nf4", "fp4")
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
STATE_BYTES_CAP = 1 << 16  # largest JSON of a matrix's state
MAXIMUM_RUN = 4096  # largest run with one scale, as in bitsandbytes


class _State(msgspec.Struct):
    """JSON in `quant_state`, the part that values depend on."""

    blocksize: int
    shape: list[int]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


class BitsAndBytes4Matrix(QuantizedMatrix):
    """bitsandbytes' nf4 and fp4: two codes in a byte, the earlier one high, in one run over the whole matrix.

    A value is quant_map[code] * absmax[item // blocksize]. With double quantization absmax is itself
    nested_quant_map[absmax] * nested_absmax[index // nested_blocksize] + nested_offset.
    """

    held = ("_scales",)

    def __init__(self, files: TensorBytes, key: str) -> None:
        name = next((name for name in TYPES if files.find(f"{key}.quant_state.bitsandbytes__{name}")), TYPES[0])
        super().__init__(files, key, f"bitsandbytes {name}")
        codes = self._entry(key, {"U8"})
        state_key = f"{key}.quant_state.bitsandbytes__{name}"
        if self._entry(state_key, {"U8"}).byte_count > STATE_BYTES_CAP:
            raise self._damage(f"{state_key} is larger than {STATE_BYTES_CAP} bytes")
        try:
            self._state = msgspec.json.decode(self._whole(state_key).tobytes(), type=_State)
        except msgspec.DecodeError as error:
            raise self._damage(f"{state_key} is malformed ({error})") from error
        state = self._state
        self.shape = tuple(state.shape)
        items = math.prod(self.shape)
        if (
            not self.shape
            or min(self.shape) < 1
            or -(-items // 2) != codes.byte_count
            or not 1 <= state.blocksize <= MAXIMUM_RUN
        ):
            raise self._damage(
                f"{state_key} says shape {list(self.shape)} in runs of {state.blocksize}, but {codes.byte_count} bytes "
                "of codes are stored"
            )
        runs = -(-items // state.blocksize)
        self._is_nested = files.find(f"{key}.nested_absmax") is not None
        self._entry(f"{key}.absmax", {"U8"} if self._is_nested else FLOATS)
        self._check(f"{key}.absmax", (runs,))
        self._entry(f"{key}.quant_map", FLOATS)
        self._check(f"{key}.quant_map", (16,))
        if self._is_nested:
            if not 1 <= state.nested_blocksize <= MAXIMUM_RUN:
                raise self._damage(f"{state_key} says runs of {state.nested_blocksize} scales")
            self._entry(f"{key}.nested_absmax", FLOATS)
            self._check(f"{key}.nested_absmax", (-(-runs // state.nested_blocksize),))
            self._entry(f"{key}.nested_quant_map", FLOATS)
            self._check(f"{key}.nested_quant_map", (256,))

    @cached_property
    def _table(self) -> Floats:
        return self._floats(f"{self.key}.quant_map")

    @cached_property
    def _scales(self) -> Floats:
        """The scale of each run."""
        if not self._is_nested:
            return self._floats(f"{self.key}.absmax")
        codes = self._floats(f"{self.key}.nested_quant_map")[self._whole(f"{self.key}.absmax")]
        largest = np.repeat(self._floats(f"{self.key}.nested_absmax"), self._state.nested_blocksize)[: len(codes)]
        return codes * largest + np.float32(self._state.nested_offset)

    def _storage(self) -> Storage:
        largest = float(np.abs(self._scales).max(initial=0)) * float(np.abs(self._table).max())
        return Storage(nearest_float(largest), is_exact=False)

    def rows(self, first: int, count: int) -> Floats:
        columns = self.shape[-1]
        begin, end = first * columns, (first + count) * columns
        first_byte = begin // 2
        pairs = self._files.read(self.key, first_byte, -(-end // 2) - first_byte)
        codes = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[begin - first_byte * 2 :][: end - begin]
        size = self._state.blocksize
        runs = self._scales[begin // size : -(-end // size)]
        scales = np.repeat(runs, size)[begin % size :][: end - begin]
        return (np.take(self._table, codes, mode="clip") * scales).reshape(count, columns)


class Mxfp4Matrix(QuantizedMatrix):
    """MXFP4: codes [..., rows, columns / 32, 16] or [rows, columns / 2], two in a byte, the earlier one low.

    A value is MXFP4's value of the code times 2^(scale - 127). ggml's blocks hold it exactly.
    """

    def __init__(self, files: TensorBytes, key: str, codes_key: str, scale_key: str) -> None:
        super().__init__(files, key, "MXFP4")
        self._codes_key, self._scale_key = codes_key, scale_key
        codes = self._entry(codes_key, {"U8", "I8"})
        scales = self._entry(scale_key, {"U8", "F8_E8M0"})
        self.shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK_ITEMS) if scales.shape else ()
        packed = BLOCK_ITEMS // 2
        if len(self.shape) < 2 or codes.shape not in (
            (*scales.shape, packed),
            (*scales.shape[:-1], scales.shape[-1] * packed),
        ):
            raise self._damage(
                f"{codes_key} has shape {list(codes.shape)}, which does not fit the scales {list(scales.shape)}"
            )

    def _storage(self) -> Storage:
        return Storage("MXFP4", is_exact=True)

    def _read(self, first: int, count: int) -> tuple[Bytes, Bytes]:
        """Codes [blocks, 16] and scales [blocks] of rows."""
        blocks, half = self.shape[-1] // BLOCK_ITEMS, BLOCK_ITEMS // 2
        codes = self._files.read(self._codes_key, first * blocks * half, count * blocks * half)
        return codes.reshape(-1, half), self._files.read(self._scale_key, first * blocks, count * blocks)

    def rows(self, first: int, count: int) -> Floats:
        codes, scales = self._read(first, count)
        values = np.concatenate([MXFP4_VALUES, -MXFP4_VALUES])
        items = values[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(-1, BLOCK_ITEMS)
        return (items * SMALL_FLOATS["F8_E8M0"][scales][:, None]).reshape(count, self.shape[-1])

    def encoded(self, first: int, count: int, type_name: str) -> Bytes:
        if type_name != "MXFP4":
            return super().encoded(first, count, type_name)
        return mxfp4_blocks(*self._read(first, count))
