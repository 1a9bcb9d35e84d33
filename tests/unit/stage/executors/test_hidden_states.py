"""What a hop's number formats keep of hidden states of any size, and what they make of numbers that are none."""

import numpy as np
import pytest
import torch

from noodle.errors import WireError
from noodle.wire.frames import ACTIVATION_DTYPES, checked_tensor, row_bytes, tensor_bytes
from services.stage.executors.hidden_states import LARGEST_FLOAT16, cast, decode, encode

# of one number, for float16 and bfloat16; of a row's largest one, for int8
RELATIVE_ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127 * 1.0001}


def some_rows(seed):
    """Rows of any shape and of sizes from 1e-4 to 1e4, as hidden states have them."""
    draw = np.random.default_rng(seed)
    shape = int(draw.integers(0, 40)), int(draw.integers(1, 200))
    sizes = 10.0 ** draw.uniform(-4, 4, (shape[0], 1))
    return (draw.standard_normal(shape) * sizes).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_what_comes_back_is_as_near_as_its_format_allows(dtype, seed):
    rows = some_rows(seed)
    sent = encode(rows, dtype)
    assert sent.shape == rows.shape
    assert sent.data.nbytes == tensor_bytes(dtype, rows.shape)
    received = decode(checked_tensor(dtype, sent.shape, memoryview(bytes(sent.data))))
    assert (received.dtype, received.shape) == (np.float32, rows.shape)
    size = np.abs(rows).max(axis=1, initial=0, keepdims=True) if dtype == "int8" else np.abs(rows)
    subnormal = 2.0**-24 if dtype == "float16" else 0.0
    assert (np.abs(received - rows) <= size * RELATIVE_ERROR[dtype] + subnormal).all()


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_sending_on_what_came_changes_nothing_more(dtype):
    once = encode(some_rows(3), dtype)
    assert cast(once, dtype) is once
    again = encode(decode(once), dtype)
    assert bytes(again.data) == bytes(once.data)


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_some_rows_of_a_tensor_are_a_tensor(dtype):
    rows = some_rows(5)
    sent, size = encode(rows, dtype), row_bytes(dtype, rows.shape[1])
    part = checked_tensor(dtype, (2, rows.shape[1]), sent.data[size : 3 * size])
    assert (decode(part) == decode(sent)[1:3]).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_is_torchs(name):
    rows = some_rows(7)
    theirs = torch.from_numpy(rows).to(getattr(torch, name)).view(torch.uint8).numpy().tobytes()
    assert bytes(encode(rows, name).data) == theirs


def test_a_number_too_large_for_float16_becomes_the_largest_one():
    assert decode(encode(np.float32([[1e6, -1e6, 65519, 3]]), "float16")).tolist() == [
        [LARGEST_FLOAT16, -LARGEST_FLOAT16, LARGEST_FLOAT16, 3]
    ]


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_a_token_that_overflowed_is_seen_to_have_and_spoils_no_other(dtype, wrong):
    rows = np.ones((3, 8), np.float32)
    rows[1, 4] = wrong
    received = decode(encode(rows, dtype))
    assert not np.isfinite(received[1]).all()
    assert np.isfinite(received[[0, 2]]).all()


def test_zeros_and_no_rows_at_all_cross_in_int8():
    assert decode(encode(np.zeros((2, 4), np.float32), "int8")).tolist() == [[0] * 4] * 2
    assert decode(encode(np.zeros((0, 4), np.float32), "int8")).shape == (0, 4)


@pytest.mark.parametrize(("shape", "size"), [((2, 4), 15), ((2, 4), 8), ((8,), 12), ((1, 2, 4), 12)])
def test_int8_without_its_scales_or_without_rows_is_refused(shape, size):
    with pytest.raises(WireError):
        checked_tensor("int8", shape, memoryview(bytes(size)))
