"""Products with chosen experts are those of the same numbers, and a token's have the same bits in any company."""

import tracemalloc

import numpy as np
import pytest

from noodle.model.ggml_types import GGML_TYPES
from services.stage.executors.ggml.kernels.products import BLOCK_TYPES, FLOAT_TYPES
from services.stage.executors.ggml.weights import TensorLayout, WeightBlock
from tests.support.sampling import sampled
from tests.support.stages.ggml_operation import Graph, stored_as
from tests.unit.stage.executors.ggml.kernels.test_products import as_multiplied

TYPES = FLOAT_TYPES + BLOCK_TYPES
EXPERTS, OUTPUTS, LENGTH = 12, 48, 256
MOST_TOKENS = 70


def experts_of(ggml, kernels, kind, experts=EXPERTS, outputs=OUTPUTS, length=LENGTH):
    """The packed bytes of the matrices, ggml's bytes, and what they stand for [experts, outputs, length]."""
    values = np.random.default_rng(0).standard_normal((experts, outputs, length)).astype(np.float32)
    stored, meant = stored_as(ggml, kind, values.reshape(-1, length))
    memory = stored.copy()
    layout = TensorLayout("expert_up.weight", GGML_TYPES[kind].number, (length, outputs, experts), 0, len(stored))
    assert kernels.is_packed("0", layout, also_embedding=False)
    kernels.pack(layout, WeightBlock((layout,), memory))
    return memory, stored, meant.reshape(experts, outputs, length)


def chosen_by(tokens, used, experts=EXPERTS):
    """Ids [tokens, used]: each token's differ, and some experts are chosen by most tokens."""
    random = np.random.default_rng(2)
    weights = np.arange(1, experts + 1) ** 2.0
    each = [random.choice(experts, used, replace=False, p=weights / weights.sum()) for _ in range(tokens)]
    return np.array(each, np.int32)


def rows_of(tokens, slots, length=LENGTH):
    return np.random.default_rng(1).standard_normal((tokens, slots, length)).astype(np.float32)


def product(ggml, kernels, kind, memory, rows, ids, *, experts=EXPERTS, outputs=OUTPUTS, threads=1):
    graph = Graph(ggml, threads)
    context = graph.memory.context
    weight = graph.stored(kind, memory, rows.shape[-1], outputs, experts)
    routes = kernels.routes(context, graph.input(ids), experts)
    tiles = kernels.tiles(context, graph.input(rows), kernels.tiles_of(weight), routes)
    return graph.compute(kernels.product(context, weight, tiles, routes), (*ids.shape, outputs))


def expected(kernels, kind, values, rows, ids):
    """[tokens, used, outputs] by numpy."""
    tokens, used = ids.shape
    slots = np.broadcast_to(rows, (tokens, used, rows.shape[-1])).reshape(tokens * used, -1)
    given = as_multiplied(slots.copy(), kind, kernels).reshape(tokens, used, -1)
    return np.einsum("tuol,tul->tuo", values[ids], given)


@pytest.mark.parametrize("kind", TYPES)
@sampled(
    ("tokens", "used", "slots"),
    [(tokens, used, slots) for tokens in (1, 2, 7, 33, 70) for used in (1, 2, 4, 8) for slots in {1, used}],
    {(1, 8, 1), (70, 4, 4)},
)
def test_each_tokens_experts_give_the_products_of_their_numbers(tokens, used, slots, kind, ggml, kernels):
    memory, _, values = experts_of(ggml, kernels, kind)
    rows, ids = rows_of(tokens, slots), chosen_by(tokens, used)
    found = product(ggml, kernels, kind, memory, rows, ids, threads=2)
    np.testing.assert_allclose(found, expected(kernels, kind, values, rows, ids), rtol=1e-5, atol=2e-6 * LENGTH)


@pytest.mark.parametrize("kind", TYPES)
def test_they_are_close_to_ggmls_own(kind, ggml, kernels):
    """Which rounds activations in its own way for each type of weights."""
    memory, stored, _ = experts_of(ggml, kernels, kind)
    rows, ids = rows_of(9, 1), chosen_by(9, 4)
    graph = Graph(ggml)
    weight = graph.stored(kind, stored, LENGTH, OUTPUTS, EXPERTS)
    context = graph.memory.context
    theirs = ggml.ggml_mul_mat_id(context, weight, graph.input(rows), graph.input(ids))
    theirs = graph.compute(theirs, (*ids.shape, OUTPUTS))
    found = product(ggml, kernels, kind, memory, rows, ids)
    assert np.linalg.norm(found - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("threads", "used"), [(1, 8), (2, 2), (5, 4)])
def test_a_token_has_the_same_bits_alone_and_in_any_company(threads, used, kind, ggml, kernels):
    memory, _, _ = experts_of(ggml, kernels, kind)
    rows, ids = rows_of(MOST_TOKENS, used), chosen_by(MOST_TOKENS, used)
    each = [product(ggml, kernels, kind, memory, rows[[token]], ids[[token]]) for token in range(MOST_TOKENS)]
    alone = np.concatenate(each)
    for tokens in range(1, MOST_TOKENS + 1):
        first = MOST_TOKENS - tokens  # so that a token has another place each time
        found = product(ggml, kernels, kind, memory, rows[first:], ids[first:], threads=threads)
        np.testing.assert_array_equal(found, alone[first:], err_msg=f"{tokens} tokens")


@pytest.mark.parametrize("kind", ["Q4_K", "BF16"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_expert_for_all_tokens_takes_several_passes(threads, kind, ggml, kernels):
    """Its rows are more than the tiles that stay in the cache at once."""
    length, tokens = 1024, 300
    memory, _, values = experts_of(ggml, kernels, kind, experts=3, outputs=32, length=length)
    rows, ids = rows_of(tokens, 1, length), np.full((tokens, 1), 1, np.int32)
    ids[::50] = 2
    found = product(ggml, kernels, kind, memory, rows, ids, experts=3, outputs=32, threads=threads)
    np.testing.assert_allclose(found, expected(kernels, kind, values, rows, ids), rtol=1e-5, atol=2e-6 * length)


def test_an_expert_that_is_not_there_reads_nothing_outside(ggml, kernels):
    """No choice of ggml's gives such a number."""
    memory, _, values = experts_of(ggml, kernels, "Q8_0")
    rows, ids = rows_of(4, 1), np.array([[3, -1], [1 << 30, 5], [-(1 << 31), 0], [4, EXPERTS]], np.int32)
    found = product(ggml, kernels, "Q8_0", memory, rows, ids)
    nearest = np.clip(ids, 0, EXPERTS - 1)
    np.testing.assert_allclose(found, expected(kernels, "Q8_0", values, rows, nearest), rtol=1e-5, atol=1e-3)


def test_experts_whose_matrices_are_no_whole_groups_are_left_to_ggml(kernels):
    layout = TensorLayout("expert_up.weight", GGML_TYPES["Q8_0"].number, (64, 24, 4), 0, 0)
    assert not kernels.is_packed("0", layout, also_embedding=False)


def test_packing_experts_takes_memory_for_16_rows_alone(kernels):
    experts, outputs, length = 128, 64, 1024
    layout = TensorLayout(
        "expert_up.weight",
        GGML_TYPES["Q4_K"].number,
        (length, outputs, experts),
        0,
        experts * outputs * length // 256 * 144,
    )
    block = WeightBlock((layout,), np.zeros(layout.byte_count, np.uint8))
    tracemalloc.start()
    try:
        kernels.pack(layout, block)
        assert tracemalloc.get_traced_memory()[1] < layout.byte_count // 128
    finally:
        tracemalloc.stop()


def best(ggml, kernels, scores, count):
    graph = Graph(ggml, 2)
    found = kernels.best_experts(graph.memory.context, graph.input(scores), count)
    return graph.compute(found, (len(scores), count)).view(np.int32)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_best_experts_are_chosen_in_order_and_of_equal_ones_the_first(count, ggml, kernels):
    scores = np.random.default_rng(3).integers(0, 9, (37, 60)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(best(ggml, kernels, scores, count), expected)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_choose_different_experts_that_are_there(wrong, ggml, kernels):
    scores = np.random.default_rng(3).standard_normal((3, 60)).astype(np.float32)
    scores[1] = wrong
    scores[2, ::3] = wrong
    for chosen in best(ggml, kernels, scores, 8):
        assert len(set(chosen)) == 8
        assert chosen.min() >= 0
        assert chosen.max() < 60


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_weighted_sum_of_experts_is_that_of_numpy_in_order_of_the_slots(threads, ggml, kernels):
    random = np.random.default_rng(4)
    results = random.standard_normal((33, 8, 80)).astype(np.float32)
    shares = random.random((33, 8, 1)).astype(np.float32)
    graph = Graph(ggml, threads)
    context = graph.memory.context
    found = kernels.sum_of_experts(context, graph.input(results), graph.input(shares))
    found = graph.compute(found, (33, 80))
    np.testing.assert_allclose(found, (results.astype(np.float64) * shares).sum(1), rtol=1e-5, atol=1e-6)
