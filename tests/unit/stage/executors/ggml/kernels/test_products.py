"""Products by noodle's own kernels are those of the same numbers, and each row's has the same bits in any company."""

import numpy as np
import pytest
import torch

from noodle.model.ggml_types import GGML_TYPES
from services.stage.executors.ggml.backend import processor_flags
from services.stage.executors.ggml.kernels.products import BLOCK_TYPES, FLOAT_TYPES, packed_weights
from services.stage.executors.ggml.weights import GROUP_ROWS, TensorLayout, WeightBlock
from tests.support.sampling import sampled
from tests.support.stages.ggml_operation import NEEDED, Graph, needed, stored_as

TYPES = FLOAT_TYPES + BLOCK_TYPES
MOST_ROWS = 70


def a_weight(ggml, kind, outputs, length, seed=0):
    """A matrix as ggml has it, and what its bytes stand for."""
    values = np.random.default_rng(seed).standard_normal((outputs, length)).astype(np.float32)
    return stored_as(ggml, kind, values)


def packed(kernels, kind, stored, outputs, length):
    """The bytes of a matrix packed, with room for the rows that fill up its last group."""
    row_bytes = len(stored) // outputs
    memory = np.zeros(-(-outputs // GROUP_ROWS) * GROUP_ROWS * row_bytes, np.uint8)
    memory[: len(stored)] = stored
    layout = TensorLayout("weight", GGML_TYPES[kind].number, (length, outputs), 0, len(stored))
    assert kernels.is_packed("0", layout, also_embedding=True)
    kernels.pack(layout, WeightBlock((layout,), memory))
    return memory


def in_8_bits(rows):
    """Rows as the kernels round them."""
    blocks = rows.reshape(len(rows), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.where(scales > 0, np.float32(1) / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    return (np.rint(blocks * inverse).astype(np.float64) * scales).reshape(rows.shape)


def as_multiplied(rows, kind, kernels):
    """Rows as the kernels round them for weights of a type."""
    if kind in BLOCK_TYPES:
        return in_8_bits(rows)
    if kind == "BF16" and kernels.rounds_to_bf16:
        return torch.from_numpy(rows).bfloat16().double().numpy()
    return rows.astype(np.float64)


def product(ggml, kernels, kind, memory, rows, outputs, threads=1):
    graph = Graph(ggml, threads)
    context = graph.memory.context
    weight = graph.stored(kind, memory, rows.shape[1], outputs)
    tiles = kernels.tiles(context, graph.input(rows), kernels.tiles_of(weight))
    return graph.compute(kernels.product(context, weight, tiles), (len(rows), outputs))


def random_rows(count, length):
    return np.random.default_rng(1).standard_normal((count, length)).astype(np.float32)


SHAPES = ((16, 256), (48, 512), (37, 768), (576, 256), (1, 1536))


@pytest.mark.parametrize("kind", TYPES)
@sampled(("outputs", "length"), SHAPES, {(48, 512), (37, 768)})
@pytest.mark.parametrize("count", [1, 3, 16, 33])
def test_a_product_is_that_of_the_numbers(count, outputs, length, kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, outputs, length)
    memory = packed(kernels, kind, stored, outputs, length)
    rows = random_rows(count, length)
    rows[0, :32] = 0.0  # a block without a scale
    found = product(ggml, kernels, kind, memory, rows, outputs, threads=2)
    expected = as_multiplied(rows, kind, kernels) @ values.T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * length)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_has_the_same_bits_alone_and_in_any_company(threads, kind, ggml, kernels):
    """For every number of rows up to more than four tiles; the last group of weight rows is not full."""
    outputs, length = 137, 512
    stored, _ = a_weight(ggml, kind, outputs, length)
    memory = packed(kernels, kind, stored, outputs, length)
    rows = random_rows(MOST_ROWS, length)
    alone = np.concatenate([product(ggml, kernels, kind, memory, rows[[row]], outputs) for row in range(MOST_ROWS)])
    for count in range(1, MOST_ROWS + 1):
        first = MOST_ROWS - count  # so that a row has another place each time
        found = product(ggml, kernels, kind, memory, rows[first:], outputs, threads)
        np.testing.assert_array_equal(found, alone[first:], err_msg=f"{count} rows")


@pytest.mark.parametrize("kind", TYPES)
def test_avx2_and_avx512_give_the_same_bits(kind, ggml):
    """But for bfloat16 on a processor with AVX512_BF16, whose instruction rounds activations too."""
    outputs, length = 37, 768
    stored, _ = a_weight(ggml, kind, outputs, length)
    rows = random_rows(19, length)
    found = []
    for instructions, flags in NEEDED.items():
        kernels = needed(lambda name=instructions: packed_weights(ggml, only=name), flags)
        if kind == "BF16" and kernels.rounds_to_bf16:
            pytest.skip("this processor has AVX512_BF16")
        memory = packed(kernels, kind, stored, outputs, length)
        found.append(product(ggml, kernels, kind, memory, rows, outputs))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", FLOAT_TYPES)
@pytest.mark.parametrize("length", [2, 4, 6, 10, 34, 1, 3, 5, 33])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_floats_of_any_length_are_summed_whole(count, length, kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, 96, length)
    layout = TensorLayout("weight", GGML_TYPES[kind].number, (length, 96), 0, len(stored))
    if kind == "BF16" and length % 2:
        assert not kernels.is_packed("0", layout, also_embedding=True)
        return
    memory = packed(kernels, kind, stored, 96, length)
    rows = random_rows(count, length)
    expected = as_multiplied(rows, kind, kernels) @ values.T
    np.testing.assert_allclose(product(ggml, kernels, kind, memory, rows, 96), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_largest_numbers_overflow_nothing(kind, ggml, kernels):
    """All bits of every element are set or none, and every activation is the largest."""
    length, outputs = 1536, 16
    _, values = a_weight(ggml, kind, outputs, length)
    for sign in (1.0, -1.0):
        extreme = np.where(values >= 0, 3.0, -3.0) * sign
        stored, values = stored_as(ggml, kind, extreme.astype(np.float32))
        rows = np.where(values[:9] >= 0, 127.0, -127.0).astype(np.float32)
        memory = packed(kernels, kind, stored, outputs, length)
        np.testing.assert_allclose(
            product(ggml, kernels, kind, memory, rows, outputs), rows @ values.T, rtol=1e-5, atol=2
        )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 40])
def test_an_activation_that_is_no_number_does_not_become_one(place, wrong, kind, ggml, kernels):
    stored, _ = a_weight(ggml, kind, 32, 256)
    memory = packed(kernels, kind, stored, 32, 256)
    rows = np.ones((3, 256), np.float32)
    rows[1, place] = wrong
    found = product(ggml, kernels, kind, memory, rows, 32)
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if kind != "MXFP4"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_block_whose_scale_is_no_number_spoils_its_own_output_alone(wrong, kind, ggml, kernels):
    stored, values = a_weight(ggml, kind, 48, 512)
    block_bytes = GGML_TYPES[kind].block_bytes
    scale = {"Q6_K": block_bytes - 2}.get(kind, 0)  # of a block
    row_bytes = len(stored) // 48
    at = 17 * row_bytes + scale
    stored[at : at + 2] = np.array([wrong], np.float16).view(np.uint8)
    memory = packed(kernels, kind, stored, 48, 512)
    rows = random_rows(5, 512)
    found = product(ggml, kernels, kind, memory, rows, 48)
    assert not np.isfinite(found[:, 17]).any()
    others = np.arange(48) != 17
    np.testing.assert_allclose(found[:, others], in_8_bits(rows) @ values[others].T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_an_embedding_are_taken_as_they_were(kind, ggml, kernels):
    """This is also that packing loses no bit: every number comes back as ggml reads it."""
    stored, values = a_weight(ggml, kind, 150, 1280)
    memory = packed(kernels, kind, stored, 150, 1280)
    graph = Graph(ggml, 2)
    ids = np.array([0, 149, *range(120, 150), 17, 16, 15, 17], np.int32)
    weight = graph.stored(kind, memory, 1280, 150)
    found = graph.compute(kernels.take_rows(graph.memory.context, weight, graph.input(ids)), (len(ids), 1280))
    np.testing.assert_array_equal(found, values[ids].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("embedding", "Q8_0", (64, 64)),
        ("embedding", "F32", (64, 64)),
        ("0", "Q2_K", (256, 64)),
        ("0", "IQ3_S", (256, 64)),
        ("0", "F32", (64,)),
        ("0", "Q8_0", (64, 64, 4)),  # experts
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_ggml(name, kind, sizes, kernels):
    layout = TensorLayout("any.weight", GGML_TYPES[kind].number, sizes, 0, 0)
    assert not kernels.is_packed(name, layout, also_embedding=False)


def test_the_weights_of_norms_stay_as_they_are(kernels):
    """Those of several heads have two axes."""
    layout = TensorLayout("query_key_norm.weight", GGML_TYPES["F32"].number, (64, 16), 0, 64 * 16 * 4, is_matrix=False)
    assert not kernels.is_packed("0", layout, also_embedding=True)


def test_learned_positions_whose_rows_ggml_takes_stay_as_they_are(kernels):
    layout = TensorLayout("positions.weight", GGML_TYPES["F32"].number, (64, 64), 0, 64 * 64 * 4)
    assert not kernels.is_packed("positions", layout, also_embedding=True)


def test_without_noodles_own_library_all_is_left_to_ggml(ggml, monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: None)
    assert packed_weights(ggml) is None


def test_a_library_from_before_these_kernels_leaves_all_to_ggml_and_says_so(ggml, monkeypatch, caplog):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: object())
    assert packed_weights(ggml) is None
    assert "make setup" in caplog.text


def test_of_two_kinds_of_instructions_the_newer_ones_multiply(ggml, kernels):
    has_avx512 = (processor_flags() or frozenset()) >= NEEDED["avx512"]
    assert packed_weights(ggml).instructions == ("avx512" if has_avx512 else kernels.instructions)
