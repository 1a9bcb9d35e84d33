"""Products by noodle's own kernels are those of the same numbers, in every shape and on every thread."""

import numpy as np
import pytest
import torch

from services.stage.executors.ggml.backend import processor_flags
from services.stage.executors.ggml.kernels.products import GROUP_ROWS, packed_weights
from services.stage.executors.ggml.weights import TYPE_NUMBERS, TensorLayout, WeightBlock
from tests.support.sampling import sampled
from tests.support.stages.ggml_operation import Graph, ggml_calls, needed, stored_as

TYPES = ("f32", "f16", "bf16", "q8_0")
# the processor's flags that kernels need, and the types that they then multiply by
NEEDED = {
    "avx2": ({"avx2", "fma", "f16c"}, {"f32", "f16", "q8_0"}),
    "avx512": ({"avx512f", "fma", "avx512_bf16", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}, set(TYPES)),
}


@pytest.fixture(scope="module")
def ggml():
    return ggml_calls()


@pytest.fixture(scope="module", params=NEEDED)
def kernels(request, ggml):
    flags, types = NEEDED[request.param]
    found = needed(lambda: packed_weights(ggml, only=request.param), flags)
    assert found.instructions.keys() == types
    return found


@pytest.fixture
def kind(request, kernels):
    """A type by its name, where the kernels multiply by it."""
    if request.param not in kernels.instructions:
        pytest.skip(f"these kernels leave {request.param} to ggml")
    return request.param


def a_weight(ggml, kind, outputs, length, seed=0):
    """A matrix as ggml has it, and what its bytes stand for."""
    values = np.random.default_rng(seed).standard_normal((outputs, length)).astype(np.float32)
    return stored_as(ggml, kind, values)


def packed_block(kernels, name, kind, stored, outputs, length):
    placed = TensorLayout("weight", TYPE_NUMBERS[kind], (length, outputs), 0, len(stored))
    return kernels.pack({name: WeightBlock((placed,), stored)}, also_embedding=True)


def in_8_bits(rows):
    """Rows as the kernels round them."""
    blocks = rows.reshape(len(rows), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.where(scales > 0, np.float32(1) / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    return (np.rint(blocks * inverse).astype(np.float64) * scales).reshape(rows.shape)


def as_multiplied(rows, kind):
    """Rows as the kernels round them for weights of a type."""
    if kind == "q8_0":
        return in_8_bits(rows)
    if kind == "bf16":
        return torch.from_numpy(rows).bfloat16().double().numpy()
    return rows.astype(np.float64)


def product(ggml, kernels, kind, stored, rows, outputs, threads=1):
    graph = Graph(ggml, threads)
    context = graph.memory.context
    weight = graph.stored(kind, stored, rows.shape[1], outputs)
    tiles = kernels.tiles(context, graph.input(rows), kernels.tiles_of(weight))
    return graph.compute(kernels.product(context, weight, tiles), (len(rows), outputs))


SHAPES = ((16, 32), (48, 64), (576, 96), (64, 1536))


@pytest.mark.parametrize("kind", TYPES, indirect=True)
@pytest.mark.parametrize("threads", [1, 3])
@sampled(("outputs", "length"), SHAPES, {(48, 64), (64, 1536)})
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 63, 64, 65, 200])
def test_a_product_is_that_of_the_numbers(count, outputs, length, threads, kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, outputs, length)
    assert packed_block(kernels, "0", kind, stored, outputs, length) == {("0", "weight")}
    rows = np.random.default_rng(1).standard_normal((count, length)).astype(np.float32)
    rows[0, :32] = 0.0  # a block without a scale
    found = product(ggml, kernels, kind, stored, rows, outputs, threads)
    expected = as_multiplied(rows, kind) @ values.T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.sqrt(length))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"], indirect=True)
@pytest.mark.parametrize("length", [2, 4, 6, 10, 34, 1, 3, 5, 33])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_floats_of_any_length_are_summed_whole(count, length, kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, 32, length)
    packed = packed_block(kernels, "0", kind, stored, 32, length)
    assert bool(packed) == (kind != "bf16" or length % 2 == 0)
    if not packed:
        return
    rows = np.random.default_rng(1).standard_normal((count, length)).astype(np.float32)
    expected = as_multiplied(rows, kind) @ values.T
    np.testing.assert_allclose(product(ggml, kernels, kind, stored, rows, 32), expected, rtol=1e-5, atol=1e-4)


def test_the_largest_numbers_overflow_nothing(ggml, kernels):
    length, outputs = 1536, 16
    stored = np.empty((outputs, length // 32, 34), np.uint8)
    stored[..., :2] = np.frombuffer(np.float16(1.0).tobytes(), np.uint8)
    stored[..., 2:] = np.array([-127, 127] * 16, np.int8).view(np.uint8)
    values = np.tile(np.array([-127.0, 127.0]), (outputs, length // 2))
    rows = np.tile(np.array([-127.0, 127.0], np.float32), (9, length // 2))
    stored = stored.reshape(-1)
    packed_block(kernels, "0", "q8_0", stored, outputs, length)
    np.testing.assert_allclose(product(ggml, kernels, "q8_0", stored, rows, outputs), rows @ values.T, rtol=1e-6)


@pytest.mark.parametrize("kind", TYPES, indirect=True)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 40])
def test_what_is_no_number_does_not_become_one(place, wrong, kind, ggml, kernels):
    stored, _ = a_weight(ggml, kind, 32, 64)
    packed_block(kernels, "0", kind, stored, 32, 64)
    rows = np.ones((3, 64), np.float32)
    rows[1, place] = wrong
    found = product(ggml, kernels, kind, stored, rows, 32)
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("kind", TYPES, indirect=True)
def test_rows_of_an_embedding_are_taken_as_they_were(kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, 160, 96)
    assert packed_block(kernels, "embedding", kind, stored, 160, 96)
    graph = Graph(ggml, 2)
    ids = np.array([0, 159, 17, 16, 15, 17], np.int32)
    weight = graph.stored(kind, stored, 96, 160)
    found = graph.compute(kernels.take_rows(graph.memory.context, weight, graph.input(ids)), (6, 96))
    np.testing.assert_array_equal(found, values[ids].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("embedding", "q8_0", (64, 64)),
        ("embedding", "f32", (64, 64)),
        ("0", "q4_0", (64, 64)),
        ("0", "f32", (64,)),
        ("0", "f16", (64, GROUP_ROWS - 1)),
        ("0", "q8_0", (64, GROUP_ROWS + 1)),
        ("0", "q8_0", (64, 64, 4)),  # experts
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_ggml(name, kind, sizes, ggml, kernels):
    byte_count = ggml.ggml_row_size(TYPE_NUMBERS[kind], sizes[0]) * int(np.prod(sizes[1:]))
    memory = np.arange(byte_count).astype(np.uint8)
    before = memory.copy()
    block = WeightBlock((TensorLayout("any.weight", TYPE_NUMBERS[kind], sizes, 0, byte_count),), memory)
    assert not kernels.pack({name: block}, also_embedding=False)
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("name", ["positions.weight", "router.weight"])
def test_what_ggml_itself_multiplies_by_or_takes_rows_of_stays_as_it_is(name, ggml, kernels):
    stored, _ = a_weight(ggml, "f32", 64, 64)
    assert not kernels.pack(
        {"0": WeightBlock((TensorLayout(name, 0, (64, 64), 0, len(stored)),), stored)}, also_embedding=True
    )


def test_without_noodles_own_library_all_is_left_to_ggml(ggml, monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: None)
    assert packed_weights(ggml) is None


def test_a_library_from_before_these_kernels_leaves_all_to_ggml_and_says_so(ggml, monkeypatch, caplog):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: object())
    assert packed_weights(ggml) is None
    assert "make setup" in caplog.text


def test_of_two_kinds_of_instructions_the_newer_ones_multiply(ggml, kernels):
    chosen = packed_weights(ggml).instructions
    if (processor_flags() or frozenset()) >= NEEDED["avx512"][0]:
        assert chosen == dict.fromkeys(TYPES, "avx512")
    else:
        assert chosen == kernels.instructions
