import io
import struct

import pytest

from noodle.errors import FrameTooLarge, WireError
from noodle.wire.frames import LENGTHS, checked_tensor, encode_frame, read_frame
from noodle.wire.messages import KeepAlive, LiveSessions, SamplingParameters, Step, StepSpan

LIMIT = 1 << 20


def frame_bytes(header, body=b""):
    head, rest = encode_frame(header, body)
    return head + bytes(rest)


def a_step(**changes):
    span = StepSpan("s", 1, 0, 2, 8, SamplingParameters(temperature=0.5, seed=3))
    return Step(**{"step_id": 1, "plan_version": 2, "coordinator_epoch": 3, "dtype": "int32", "shape": [2],
                   "spans": [span], **changes})  # fmt: skip


def test_a_frame_comes_out_as_it_went_in():
    body = struct.pack("<ii", 5, 7)
    message, data = read_frame(io.BytesIO(frame_bytes(a_step(), body)).read, LIMIT)
    assert message == a_step()
    assert bytes(data) == body


def test_frames_follow_one_another_and_a_clean_end_is_none():
    stream = io.BytesIO(frame_bytes(KeepAlive()) + frame_bytes(LiveSessions(1, 1, ["a"])))
    assert read_frame(stream.read, LIMIT)[0] == KeepAlive()
    assert read_frame(stream.read, LIMIT)[0] == LiveSessions(1, 1, ["a"])
    assert read_frame(stream.read, LIMIT) is None


@pytest.mark.parametrize("cut_at", [1, 7, 9, 30])
def test_a_frame_cut_short_is_refused(cut_at):
    with pytest.raises(WireError, match="ended"):
        read_frame(io.BytesIO(frame_bytes(a_step(), b"x" * 8)[:cut_at]).read, LIMIT)


def test_a_frame_over_the_cap_is_refused_before_anything_is_read():
    stream = io.BytesIO(LENGTHS.pack(LIMIT + 1, 10))
    with pytest.raises(FrameTooLarge):
        read_frame(stream.read, LIMIT)


def test_a_header_longer_than_its_frame_is_refused():
    with pytest.raises(WireError, match="cannot contain"):
        read_frame(io.BytesIO(LENGTHS.pack(10, 50) + b"x" * 50).read, LIMIT)


@pytest.mark.parametrize(
    "header",
    [
        b"\xc1",  # never used in msgpack
        b"\x80",  # no type
        b"\x81\xa4type\xa7unknown",
        b"\x92\x01\x02",
    ],
)
def test_a_foreign_header_is_refused(header):
    with pytest.raises(WireError, match="malformed"):
        read_frame(io.BytesIO(LENGTHS.pack(4 + len(header), len(header)) + header).read, LIMIT)


def test_negative_and_absurd_numbers_in_a_header_are_refused():
    for changes in ({"plan_version": -1}, {"step_id": 1 << 60}, {"spans": [StepSpan("", 0, 0, 1, 1)]},
                    {"spans": [StepSpan("s", 0, 0, 0, 1)]}, {"shape": [1, 2, 3]}):  # fmt: skip
        with pytest.raises(WireError):
            read_frame(io.BytesIO(frame_bytes(a_step(**changes))).read, LIMIT)


def test_random_noise_never_raises_anything_but_a_wire_error():
    import random

    noise = random.Random(7)
    for _ in range(2000):
        data = noise.randbytes(noise.randrange(0, 200))
        try:
            read_frame(io.BytesIO(data).read, LIMIT)
        except WireError:
            continue


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "word"),
    [
        ("float64", (1,), 8, "float64"),
        ("float32", (2, 2), 12, "takes 16 bytes"),
        ("float32", (-1, -1), 4, "negative"),
        ("object", (1,), 8, "object"),
    ],
)
def test_a_tensor_must_be_what_its_header_says(dtype, shape, size, word):
    with pytest.raises(WireError, match=word):
        checked_tensor(dtype, shape, memoryview(bytes(size)))
