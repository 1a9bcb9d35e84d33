"""Hidden states in the activation dtype of a hop, which may differ from the dtype that a stage computes in.

int8 is a dtype of hops alone: a token's row is its float32 scale followed by one byte per number, so rows can still be
split. A number too large for float16 becomes the largest float16. Infinities and NaN are kept, so that the next stage
sees the overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.wire.frames import SCALE_BYTES, ActivationTensor, row_bytes

LARGEST_FLOAT16 = 65504.0
LARGEST_INT8 = 127.0
NOT_A_NUMBER_BFLOAT16 = 0x7FC0

Rows = npt.NDArray[np.float32]  # [tokens, hidden_size]


def encode(values: Rows, dtype: str) -> ActivationTensor:
    encoded = _ENCODERS[dtype](np.ascontiguousarray(values, np.float32))
    data = encoded.view(np.uint8).reshape(-1).data if encoded.size else memoryview(b"")
    return ActivationTensor(dtype, tuple(values.shape), data)


def decode(tensor: ActivationTensor) -> Rows:
    """Decode a checked tensor (noodle.wire.frames) to float32, exactly except for int8."""
    tokens, hidden_size = tensor.shape
    if tensor.dtype == "bfloat16":
        halves = np.frombuffer(tensor.data, np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(tensor.shape)
    if tensor.dtype == "int8":
        rows = np.frombuffer(tensor.data, np.uint8).reshape(tokens, row_bytes("int8", hidden_size))
        scales = np.ascontiguousarray(rows[:, :SCALE_BYTES]).view(np.float32)
        return rows[:, SCALE_BYTES:].view(np.int8) * scales
    if tensor.dtype not in ("float32", "float16"):
        raise ValueError(f"{tensor.dtype} is not a dtype of hidden states")
    return np.frombuffer(tensor.data, tensor.dtype).astype(np.float32, copy=False).reshape(tensor.shape)


def cast(tensor: ActivationTensor, dtype: str) -> ActivationTensor:
    """The same rows in another dtype; the tensor itself if it has that dtype."""
    return tensor if tensor.dtype == dtype else encode(decode(tensor), dtype)


def _float16(values: Rows) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    overflowed = np.isinf(halves) & np.isfinite(values)
    if overflowed.any():
        halves[overflowed] = np.copysign(np.float16(LARGEST_FLOAT16), halves[overflowed])
    return halves


def _bfloat16(values: Rows) -> npt.NDArray[np.uint16]:
    """Upper halves of float32, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = NOT_A_NUMBER_BFLOAT16
    return rounded


def _int8(values: Rows) -> npt.NDArray[np.uint8]:
    largest = np.abs(values).max(axis=1, initial=0.0, keepdims=True)
    scales = (largest / LARGEST_INT8).astype(np.float32)
    is_finite = np.isfinite(largest)
    divisors = np.where(is_finite & (scales > 0), scales, np.float32(1))
    numbers = np.rint(np.where(is_finite, values, 1) / divisors).astype(np.int8)
    scales = np.where(is_finite, scales, np.float32(np.nan))
    return np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], axis=1)


_ENCODERS: dict[str, Callable[[Rows], npt.NDArray[Any]]] = {
    "float32": np.asarray,
    "float16": _float16,
    "bfloat16": _bfloat16,
    "int8": _int8,
}
