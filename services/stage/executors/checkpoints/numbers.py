"""Numbers of safetensors as float32, and which of ggml's 16 bit types holds a product without rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

LARGEST_F16 = 65504.0
# the largest value of a matrix that float16 still holds with all its 11 bits, and with 10 bits for values 2^-4 of it
SMALLEST_RANGE = 2.0**-10

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


def _small_floats(exponent_bits: int, mantissa_bits: int, *, has_infinity: bool) -> Floats:
    """The values of all 256 codes of an 8 bit float (OCP 8-bit floating point specification 1.0)."""
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    bias = (1 << exponent_bits - 1) - 1
    fraction = np.where(exponent == 0, 0.0, 1.0) + mantissa / (1 << mantissa_bits)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    last = (1 << exponent_bits) - 1
    if has_infinity:
        values = np.where(exponent == last, np.where(mantissa == 0, np.inf, np.nan), values)
    else:  # E4M3 has no infinity, and one NaN of each sign
        values = np.where((exponent == last) & (mantissa == (1 << mantissa_bits) - 1), np.nan, values)
    return np.where(codes >> 7, -values, values).astype(np.float32)


def _power_of_two_scales() -> Floats:
    """The values of all codes of E8M0: 2^(code - 127), and NaN for 255."""
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


SMALL_FLOATS: dict[str, Floats] = {
    "F8_E4M3": _small_floats(4, 3, has_infinity=False),
    "F8_E5M2": _small_floats(5, 2, has_infinity=True),
    "F8_E8M0": _power_of_two_scales(),
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16", *SMALL_FLOATS})


def to_float32(data: Bytes, dtype: str) -> Floats:
    """Values of a tensor's bytes; `dtype` is safetensors' name of a type of `FLOATS`."""
    if dtype in SMALL_FLOATS:
        return np.take(SMALL_FLOATS[dtype], data, mode="clip")  # clip leaves out a check of the bounds
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view(DTYPES[dtype]).astype(np.float32)


def to_float16(values: Floats) -> Bytes:
    """Bytes of finite values in float16, three times as fast as numpy's conversion; values out of range are infinite.

    Times 2^-112 a float32 has the bits of the float16, 13 places higher. Ties go to even; a subnormal float16 may be
    one unit in its last place away, since the multiplication rounds it too.
    """
    bits = values.view(np.uint32)
    signs = (bits >> 16).astype(np.uint16) & np.uint16(0x8000)
    scaled = np.abs(values)
    scaled *= np.float32(2.0**-112)
    magnitudes = scaled.view(np.uint32)
    magnitudes += (magnitudes >> 13 & 1) + np.uint32(0xFFF)
    magnitudes >>= 13
    halves = np.minimum(magnitudes, 0x7C00, out=magnitudes).astype("<u2")
    halves |= signs
    return halves.reshape(-1).view(np.uint8)


def holds_exactly(values: npt.NDArray[np.float64]) -> str:
    """The smallest of F16, BF16 and F32 that holds each of the values without rounding; empty if none does."""
    with np.errstate(over="ignore"):
        as_f32 = values.astype(np.float32)
        if not np.array_equal(as_f32.astype(np.float64), values, equal_nan=True):
            return ""
        if np.array_equal(values.astype(np.float16).astype(np.float64), values, equal_nan=True):
            return "F16"
    return "F32" if np.any(as_f32.view(np.uint32) & 0xFFFF) else "BF16"


def nearest_float(largest: float) -> str:
    """F16 for a matrix whose values it holds with 11 significant bits, otherwise F32.

    Float16 rounds a value by at most 2^-12 of it, bfloat16 by 2^-9. `largest` bounds the matrix's magnitudes.
    """
    return "F16" if SMALLEST_RANGE <= largest <= LARGEST_F16 or largest == 0 else "F32"
