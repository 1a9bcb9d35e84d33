"""Integers with one scale for each group of columns as ggml's blocks of 32, bit by bit (ggml-common.h, ggml-quants.c).

A block of Q4_0, Q5_0 or Q8_0 holds a float16 scale d and 32 integers q, and means d * q with q from -8 to 7, from -16
to 15 or from -128 to 127. So it holds integer codes with a zero point and a scale exactly, if the scale is a float16,
the codes minus their zero points lie in that range, and groups are whole blocks. Q4_1 (d * q + m) would round m.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.stage.executors.checkpoints.numbers import Bytes, Floats

BLOCK_ITEMS = 32
RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}


def exact_type(scales: Floats, least: int, most: int, group_size: int) -> str:
    """The smallest type of blocks that holds integers from `least` to `most` times `scales` exactly; empty if none."""
    if group_size % BLOCK_ITEMS or not np.all(np.isfinite(scales)):
        return ""
    with np.errstate(over="ignore"):
        if not np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
            return ""
    return next((name for name, (low, high) in RANGES.items() if low <= least and most <= high), "")


def integer_blocks(type_name: str, integers: npt.NDArray[np.int8] | npt.NDArray[np.int16], scales: Floats) -> Bytes:
    """Blocks of a type of `RANGES` from integers [rows, columns] and scales [rows, columns / 32]."""
    rows, columns = integers.shape
    codes = integers.reshape(rows, columns // BLOCK_ITEMS, BLOCK_ITEMS)
    d = scales.astype("<f2")[..., None].view(np.uint8)
    if type_name == "Q8_0":
        return np.concatenate([d, codes.astype(np.int8).view(np.uint8)], axis=-1).reshape(-1)
    half = BLOCK_ITEMS // 2
    raised = codes.astype(np.uint8) + np.uint8(-RANGES[type_name][0])  # bytes wrap around
    nibbles = (raised[..., :half] & 15) | (raised[..., half:] & 15) << 4
    if type_name == "Q4_0":
        return np.concatenate([d, nibbles], axis=-1).reshape(-1)
    fifth_bits = np.packbits(raised >> 4, axis=-1, bitorder="little")
    return np.concatenate([d, fifth_bits, nibbles], axis=-1).reshape(-1)


def mxfp4_blocks(codes: Bytes, scales: Bytes) -> Bytes:
    """Blocks of MXFP4 from codes [blocks, 16], two in a byte with the earlier one low, and E8M0 scales [blocks].

    Both formats number the 16 values in the same way; ggml puts items j and j + 16 in one byte, not 2j and 2j + 1.
    """
    low, high = codes & 15, codes >> 4
    in_order = np.stack([low, high], axis=-1).reshape(len(codes), BLOCK_ITEMS)
    half = BLOCK_ITEMS // 2
    nibbles = in_order[:, :half] | in_order[:, half:] << 4
    return np.concatenate([scales[:, None], nibbles], axis=-1).reshape(-1)
