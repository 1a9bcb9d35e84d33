"""Attention by noodle's own kernel is that of the numbers: every shape, type, window and instruction."""

import numpy as np
import pytest

from services.stage.executors.ggml.kernels.attention import flash_attention_kernel
from services.stage.executors.ggml.weights import TYPE_NUMBERS
from tests.support.sampling import sampled
from tests.support.stages.ggml_operation import Graph, ggml_calls, needed, stored_as

NEEDED = {"avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "fma", "f16c"}}
TYPES = ("f32", "f16", "q8_0")


@pytest.fixture(scope="module")
def ggml():
    return ggml_calls()


@pytest.fixture(scope="module", params=NEEDED)
def instructions(request, ggml):
    needed(lambda: flash_attention_kernel(ggml, 64, TYPE_NUMBERS["f16"], only=request.param), NEEDED[request.param])
    return request.param


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(ggml, instructions, query, key, value, kind="f32", *, scale=0.125, cap=0.0, window=0, threads=1):
    """Return the attention of queries [tokens, heads, dimensions]: by the kernel, and by numpy in float64."""
    tokens, heads, dimensions = query.shape
    keys, key_heads, _ = key.shape
    graph = Graph(ggml, threads)
    kept_key, key = stored_as(ggml, kind, key)
    kept_value, value = stored_as(ggml, kind, value)
    head_bytes = ggml.ggml_row_size(TYPE_NUMBERS[kind], dimensions)
    strides = (key_heads * head_bytes, head_bytes)
    k, v = (graph.stored(kind, kept, dimensions, keys, key_heads, strides=strides) for kept in (kept_key, kept_value))
    context = graph.memory.context
    q = ggml.ggml_view_3d(
        context, graph.input(query), dimensions, tokens, heads, heads * dimensions * 4, dimensions * 4, 0
    )
    kernel = flash_attention_kernel(ggml, dimensions, TYPE_NUMBERS[kind], only=instructions)
    attended = kernel.attend(context, q, k, v, scale=scale, cap=cap, window=window)
    with np.errstate(all="ignore"):
        expected = by_numpy(query, key, value, scale, cap, window)
    return graph.compute(attended, query.shape), expected


def by_numpy(query, key, value, scale, cap, window):
    tokens, heads, _ = query.shape
    keys, key_heads, _ = key.shape
    shared = heads // key_heads
    position = np.arange(keys - tokens, keys)[:, None]
    is_seen = np.arange(keys) <= position
    if window:
        is_seen &= np.arange(keys) > position - window
    found = np.empty(query.shape)
    for head in range(heads):
        scores = query[:, head].astype(float) @ key[:, head // shared].astype(float).T * scale
        if cap:
            scores = cap * np.tanh(scores / cap)
        scores[~is_seen] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        seen = np.where(is_seen[..., None], value[:, head // shared].astype(float), 0.0)
        found[:, head] = np.einsum("tk,tkd->td", weights / weights.sum(1, keepdims=True), seen)
    return found


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 1), (2, 2), (2, 40), (5, 5), (16, 32), (17, 100), (64, 64), (70, 257)]
)
@sampled(("heads", "key_heads"), ((1, 1), (4, 4), (9, 3), (7, 1)), {(4, 4), (9, 3)})
def test_attention_is_that_of_the_numbers(heads, key_heads, tokens, keys, kind, ggml, instructions):
    query, key, value = (
        random(tokens, heads, 64),
        random(keys, key_heads, 64, seed=1),
        random(keys, key_heads, 64, seed=2),
    )
    found, expected = attention(ggml, instructions, query, key, value, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dimensions", [32, 64, 96, 128, 160, 256])
def test_a_head_may_have_any_number_of_dimensions_that_models_have(dimensions, kind, ggml, instructions):
    query, key, value = random(37, 4, dimensions), random(91, 2, dimensions, seed=1), random(91, 2, dimensions, seed=2)
    found, expected = attention(ggml, instructions, query, key, value, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 3, 8, 17, 80])
def test_in_float32_heads_of_any_size_are_attended_to(dimensions, ggml, instructions):
    query, key, value = random(21, 2, dimensions), random(50, 2, dimensions, seed=1), random(50, 2, dimensions, seed=2)
    found, expected = attention(ggml, instructions, query, key, value)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@sampled("window", (1, 2, 7, 31, 32, 33, 64, 100, 1000), {1, 31, 33, 100})
@pytest.mark.parametrize(("tokens", "keys"), [(3, 3), (40, 40), (40, 71), (90, 200)])
def test_a_window_ends_what_is_attended_to(tokens, keys, window, ggml, instructions):
    keys = min(keys, window + tokens - 1)  # the caller leaves out keys before all windows
    query, key, value = random(tokens, 6, 64), random(keys, 2, 64, seed=1), random(keys, 2, 64, seed=2)
    tokens = min(tokens, keys)
    found, expected = attention(ggml, instructions, query[:tokens], key, value, window=window)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
def test_scores_are_capped(cap, ggml, instructions):
    query, key, value = 5 * random(33, 4, 64), 5 * random(80, 2, 64, seed=1), random(80, 2, 64, seed=2)
    found, expected = attention(ggml, instructions, query, key, value, cap=cap, scale=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_work_and_change_nothing(threads, ggml, instructions):
    query, key, value = random(150, 9, 64), random(300, 3, 64, seed=1), random(300, 3, 64, seed=2)
    alone, _ = attention(ggml, instructions, query, key, value, "f16")
    found, _ = attention(ggml, instructions, query, key, value, "f16", threads=threads)
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("size", [1e-4, 30.0, 1000.0])
def test_very_unequal_scores_overflow_nothing(size, ggml, instructions):
    query, key, value = size * random(40, 2, 64), random(90, 1, 64, seed=1), random(90, 1, 64, seed=2)
    found, expected = attention(ggml, instructions, query, key, value)
    np.testing.assert_allclose(found, expected, rtol=2e-3 if size > 100 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 20, 39])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_no_number_does_not_become_one(which, place, wrong, ggml, instructions):
    given = {"query": abs(random(40, 2, 64)), "key": random(40, 1, 64, seed=1), "value": random(40, 1, 64, seed=2)}
    given[which][place, 0, 5] = wrong
    found, expected = attention(ggml, instructions, **given)
    is_wrong = ~np.isfinite(expected)
    assert is_wrong.any()
    assert not np.isfinite(found[is_wrong]).any()
    if which == "query":
        assert np.isfinite(found[~is_wrong]).all()


@pytest.mark.parametrize(("dimensions", "kind"), [(257, "f32"), (512, "f16"), (40, "f16"), (48, "q8_0"), (64, "q4_0")])
def test_what_the_kernel_can_not_take_is_left_to_ggml(dimensions, kind, ggml, instructions):
    assert flash_attention_kernel(ggml, dimensions, TYPE_NUMBERS[kind], only=instructions) is None


def test_without_noodles_own_library_ggml_attends(ggml, monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: None)
    assert flash_attention_kernel(ggml, 64, TYPE_NUMBERS["f16"]) is None
