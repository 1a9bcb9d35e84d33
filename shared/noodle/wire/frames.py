"""Frames on a hop: a length-prefixed typed header and raw bytes, all checked at decoding (design D5).

frame  = frame_bytes u32 | header_bytes u32 | header (msgpack) | body (raw)
frame_bytes counts everything after itself; integers are little-endian. A stream entry is such a header alone.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from noodle.errors import FrameTooLarge, WireError
from noodle.wire.messages import HopMessage, QueueEntry

LENGTHS = struct.Struct("<II")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}  # bytes of one item; int8 also crosses a hop
ACTIVATION_DTYPES = ("float32", "float16", "bfloat16", "int8")  # of hidden states between stages
SCALE_BYTES = 4  # scale before each int8 row: a float32 that multiplies the row
MAXIMUM_HEADER_BYTES = 4 << 20  # largest header of a frame or stream entry
MAXIMUM_STEP_TOKENS = 8192  # most rows of one step; with the hidden size this bounds a frame

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[HopMessage] = msgspec.msgpack.Decoder(HopMessage)
_entry_decoder: msgspec.msgpack.Decoder[QueueEntry] = msgspec.msgpack.Decoder(QueueEntry)


@dataclass(frozen=True, slots=True)
class ActivationTensor:
    """A tensor on a hop: `data` is C-contiguous, little-endian, exactly product(shape) items of `dtype`.

    An int8 tensor has two dimensions; each row is one scale and then its items.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def checked_tensor(dtype: str, shape: tuple[int, ...], data: memoryview) -> ActivationTensor:
    """Return the tensor that a header describes; raises WireError for another dtype, shape or number of bytes."""
    if dtype not in (*ITEM_BYTES, "int8"):
        raise WireError(f"dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}, int8.")
    if any(size < 0 for size in shape):
        raise WireError(f"shape {list(shape)} has a negative size.")
    if dtype == "int8" and len(shape) != 2:
        raise WireError(f"shape {list(shape)} of int8 has no rows.")
    expected_bytes = tensor_bytes(dtype, shape)
    if data.nbytes != expected_bytes:
        raise WireError(f"shape {list(shape)} of {dtype} takes {expected_bytes} bytes, not {data.nbytes}.")
    return ActivationTensor(dtype, shape, data)


def row_bytes(dtype: str, row_items: int) -> int:
    """Bytes of one row; raises KeyError for a dtype that crosses no hop."""
    return row_items + SCALE_BYTES if dtype == "int8" else row_items * ITEM_BYTES[dtype]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; raises KeyError for a dtype that crosses no hop."""
    return math.prod(shape[:1]) * row_bytes(dtype, math.prod(shape[1:]))


def encode_frame(header: HopMessage, body: bytes | memoryview = b"") -> tuple[bytes, bytes | memoryview]:
    """Encode a frame as two pieces, to be written one after the other; the body is not copied."""
    encoded = _encoder.encode(header)
    body_bytes = body.nbytes if isinstance(body, memoryview) else len(body)
    return LENGTHS.pack(4 + len(encoded) + body_bytes, len(encoded)) + encoded, body


def whole_frame(message: HopMessage) -> bytes:
    head, _ = encode_frame(message)
    return head


def read_frame(read: Callable[[int], bytes], maximum_frame_bytes: int) -> tuple[HopMessage, memoryview] | None:
    """Read the next frame, None at a clean end of the stream.

    `read(n)` returns n bytes, fewer only at the end of the stream. Memory is allocated only after the lengths are
    checked against `maximum_frame_bytes`. Raises FrameTooLarge, or WireError for a cut or malformed frame.
    """
    lengths = read(LENGTHS.size)
    if not lengths:
        return None
    if len(lengths) < LENGTHS.size:
        raise WireError(f"the stream ended {len(lengths)} bytes into a frame's lengths.")
    frame_bytes, header_bytes = LENGTHS.unpack(lengths)
    if frame_bytes > maximum_frame_bytes or header_bytes > MAXIMUM_HEADER_BYTES:
        raise FrameTooLarge(
            f"a frame has {frame_bytes} bytes and a header of {header_bytes}; "
            f"at most {maximum_frame_bytes} and {MAXIMUM_HEADER_BYTES} are accepted."
        )
    if frame_bytes < 4 + header_bytes:
        raise WireError(f"a frame of {frame_bytes} bytes cannot contain a header of {header_bytes}.")
    header = read(header_bytes)
    body_bytes = frame_bytes - 4 - header_bytes
    body = read(body_bytes) if body_bytes else b""
    if len(header) < header_bytes or len(body) < body_bytes:
        raise WireError(f"the stream ended inside a frame of {frame_bytes} bytes.")
    try:
        return _decoder.decode(header), memoryview(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"the header of a frame is malformed: {error}") from error


def encode_entry(entry: QueueEntry) -> bytes:
    """Encode one stream entry; its only body is token ids."""
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> QueueEntry:
    """Decode one stream entry; raises FrameTooLarge or WireError."""
    if len(data) > MAXIMUM_HEADER_BYTES:
        raise FrameTooLarge(f"an entry has {len(data)} bytes; at most {MAXIMUM_HEADER_BYTES} are accepted.")
    try:
        return _entry_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"the entry is malformed: {error}") from error


def body_digest(body: bytes | bytearray | memoryview) -> str:
    """Digest that a reference names its bytes by."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()
