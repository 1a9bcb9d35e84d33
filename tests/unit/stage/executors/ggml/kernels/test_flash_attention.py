"""noodle's attention is that of the numbers, and has the same bits in any company."""

import itertools

import numpy as np
import pytest

from services.stage.executors.ggml.kernels.attention import flash_attention_kernel
from services.stage.executors.ggml.weights import TYPE_NUMBERS
from tests.support.sampling import sampled
from tests.support.stages.attention import Sessions, attention_by_numpy
from tests.support.stages.ggml_operation import NEEDED, needed, stored_as

TYPES = ("f32", "f16", "q8_0")
LEAKED = 0xFF  # NaN in every type: what rows hold that no token of the session wrote


def kernel_of(ggml, kind, head_dim=64, **options):
    return flash_attention_kernel(ggml, TYPE_NUMBERS[kind], heads=4, kv_heads=2, head_dim=head_dim, **options)


@pytest.fixture(scope="module", params=NEEDED)
def instructions(request, ggml):
    needed(lambda: kernel_of(ggml, "f16", only=request.param), NEEDED[request.param])
    return request.param


@pytest.fixture(scope="module")
def both(ggml):
    for name, flags in NEEDED.items():
        needed(lambda name=name: kernel_of(ggml, "f16", only=name), flags)
    return tuple(NEEDED)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rows_of(tokens, heads, key_heads, dimensions):
    return (
        random(tokens, heads, dimensions),
        random(tokens, key_heads, dimensions, seed=1),
        random(tokens, key_heads, dimensions, seed=2),
    )


def check(ggml, instructions, kind, query, key, value, cuts=None, **options):
    """Compare with the formula over the numbers that the rows hold."""
    tokens = len(query)
    session = Sessions(ggml, kind, query.shape[1], [key], [value], instructions=instructions, fill=LEAKED)
    found = session.in_chunks(query, cuts or [tokens], **options)
    key, value = session.stored(0)[:tokens], session.stored(1)[:tokens]
    np.testing.assert_allclose(found, attention_by_numpy(query, key, value, **options), rtol=2e-5, atol=2e-5)


def bits(values):
    return values.view(np.uint32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 70, 257])
@sampled(("heads", "key_heads"), ((1, 1), (4, 4), (9, 3), (7, 1), (22, 1)), {(4, 4), (9, 3)})
def test_attention_is_that_of_the_numbers(heads, key_heads, tokens, kind, ggml, instructions):
    check(ggml, instructions, kind, *rows_of(tokens, heads, key_heads, 64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dimensions", [32, 64, 96, 128, 160, 256, 512])
def test_a_head_may_have_any_number_of_dimensions_that_models_have(dimensions, kind, ggml, instructions):
    check(ggml, instructions, kind, *rows_of(37, 4, 2, dimensions))


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("dimensions", [1, 3, 8, 17, 80])
def test_without_blocks_heads_of_any_size_are_attended_to(dimensions, kind, ggml, instructions):
    check(ggml, instructions, kind, *rows_of(21, 2, 2, dimensions), [10, 20, 21])


@pytest.mark.parametrize("kind", TYPES)
def test_rows_hold_the_numbers_that_ggml_would_store(kind, ggml, instructions):
    _, key, value = rows_of(41, 4, 2, 64)
    session = Sessions(ggml, kind, 4, [key], [value], instructions=instructions, fill=LEAKED)
    session.in_chunks(random(41, 4, 64), [3, 4, 33, 41])
    for area, given in enumerate((key, value)):
        meant = stored_as(ggml, kind, given.reshape(-1, 64))[1].reshape(given.shape)
        off_by_one = abs(meant).max() / 127 if kind == "q8_0" else 0.0  # where a number lies between two
        difference = abs(session.stored(area)[:41] - meant)
        assert difference.max() <= 1.01 * off_by_one
        assert (difference > 0).mean() < 1e-3


@sampled("window", (1, 2, 7, 31, 32, 33, 64, 100, 1000), {1, 31, 33, 100})
@pytest.mark.parametrize("cuts", [[3], [40], [31, 71], [110, 200]])
def test_a_window_ends_what_is_attended_to(cuts, window, ggml, instructions):
    check(ggml, instructions, "f32", *rows_of(cuts[-1], 6, 2, 64), cuts, window=window)


@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
def test_scores_are_capped(cap, ggml, instructions):
    query, key, value = rows_of(80, 4, 2, 64)
    check(ggml, instructions, "f32", 5 * query, 5 * key, value, cap=cap, scale=0.3)


@pytest.mark.parametrize("size", [-1e3, -1.0, 0.0, 3.0, 100.0])
def test_a_sink_takes_a_share_and_gives_no_value(size, ggml, instructions):
    sinks = size + random(6, seed=3)
    check(ggml, instructions, "f16", *rows_of(80, 6, 2, 64), [50, 79, 80], sinks=sinks.astype(np.float32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(576, 512), (96, 64)])
def test_a_latent_row_is_key_and_value(key_dim, value_dim, kind, ggml, instructions):
    query, key = random(70, 18, key_dim), random(70, 1, key_dim, seed=1)
    session = Sessions(ggml, kind, 18, [key], value_dim=value_dim, instructions=instructions, fill=LEAKED)
    found = session.in_chunks(query, [40, 69, 70], scale=0.04)
    stored = session.stored(0)[:70]
    expected = attention_by_numpy(query, stored, stored[..., :value_dim], scale=0.04)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


CASES = [
    *itertools.product(TYPES, [(9, 3, 64)], [{}, {"window": 600, "cap": 3.0}]),
    ("f16", (14, 2, 64), {"window": 100}),
    ("f16", (8, 1, 128), {"cap": 2.0}),
    ("q8_0", (2, 2, 96), {}),
    ("f16", (4, 1, 256), {"window": 512}),
    ("f32", (3, 1, 80), {}),
]


@pytest.mark.parametrize(("kind", "shape", "options"), CASES)
def test_a_token_has_the_same_bits_however_it_comes(kind, shape, options, ggml, both):
    tokens = 1100
    query, key, value = rows_of(tokens, *shape)
    sinks = random(shape[0], seed=4)

    def found(instructions, threads, cuts, fill=LEAKED):
        session = Sessions(ggml, kind, shape[0], [key], [value], instructions=instructions, threads=threads, fill=fill)
        return bits(session.in_chunks(query, cuts, sinks=sinks, **options))

    whole = found("avx512", 1, [tokens])
    for instructions, threads in itertools.product(both, (1, 2, 5)):
        np.testing.assert_array_equal(found(instructions, threads, [tokens]), whole)
        np.testing.assert_array_equal(found(instructions, threads, [*range(37, tokens, 111), tokens], 0), whole)
        np.testing.assert_array_equal(found(instructions, threads, [600, *range(1090, tokens + 1)]), whole)


def test_the_last_of_8192_tokens_has_the_same_bits_by_decode_and_by_one_prefill(ggml, both):
    tokens = 8192
    query, key, value = rows_of(tokens, 4, 2, 64)
    whole = Sessions(ggml, "f16", 4, [key], [value], instructions="avx512", threads=2).in_chunks(query, [tokens])
    for instructions, threads in itertools.product(both, (1, 2, 5)):
        session = Sessions(ggml, "f16", 4, [key], [value], instructions=instructions, threads=threads)
        session.in_chunks(query[:-1], [5000, tokens - 1])
        last = session.attend(query[-1:], [(0, tokens - 1, tokens)])
        np.testing.assert_array_equal(bits(last), bits(whole[-1:]))


def test_a_latent_row_has_the_same_bits_however_it_comes(ggml, both):
    query, key = random(600, 16, 576), random(600, 1, 576, seed=1)
    whole = None
    for instructions, threads, cuts in itertools.product(both, (1, 2, 5), ([600], [597, 598, 599, 600], [77, 600])):
        options = {"value_dim": 512, "instructions": instructions, "threads": threads, "fill": LEAKED}
        found = bits(Sessions(ggml, "f16", 16, [key], **options).in_chunks(query, cuts, scale=0.04))
        whole = found if whole is None else whole
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_sessions_of_one_step_do_not_see_each_other(threads, ggml, instructions):
    lengths = (700, 33, 1, 1300)
    key = [random(length, 2, 64, seed=length) for length in lengths]
    value = [random(length, 2, 64, seed=length + 1) for length in lengths]
    query = [random(length, 6, 64, seed=length + 2) for length in lengths]
    alone = [
        Sessions(ggml, "f16", 6, [key[each]], [value[each]], instructions=instructions).in_chunks(query[each], [length])
        for each, length in enumerate(lengths)
    ]
    together = Sessions(ggml, "f16", 6, key, value, instructions=instructions, threads=threads, fill=LEAKED)
    first = [(each, 0, length - 1) for each, length in enumerate(lengths) if length > 1]
    together.attend(np.concatenate([query[each][:end] for each, _, end in first]), first)
    last = [(each, length - 1, length) for each, length in enumerate(lengths)]
    found = together.attend(np.concatenate([each[-1:] for each in query]), last)
    for each in range(len(lengths)):
        np.testing.assert_array_equal(bits(found[each]), bits(alone[each][-1]))


@pytest.mark.parametrize("size", [1e-4, 30.0, 1000.0])
def test_very_unequal_scores_overflow_nothing(size, ggml, instructions):
    query, key, value = rows_of(90, 2, 1, 64)
    session = Sessions(ggml, "f32", 2, [key], [value], instructions=instructions)
    found = session.in_chunks(size * query, [90])
    expected = attention_by_numpy(size * query, key, value)
    np.testing.assert_allclose(found, expected, rtol=2e-3 if size > 100 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 20, 39])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_no_number_stays_with_the_queries_that_see_it(kind, which, place, wrong, ggml, instructions):
    given = {"query": abs(random(40, 2, 64)), "key": random(40, 1, 64, seed=1), "value": random(40, 1, 64, seed=2)}
    clean = Sessions(ggml, kind, 2, [given["key"]], [given["value"]], instructions=instructions)
    expected = clean.in_chunks(given["query"], [40])
    given[which][place, 0, 5] = wrong
    session = Sessions(ggml, kind, 2, [given["key"]], [given["value"]], instructions=instructions, threads=2)
    found = session.in_chunks(given["query"], [40])
    sees = np.zeros((40, 2), bool)
    sees[place if which == "query" else slice(place, None), 0 if which == "query" else slice(None)] = True
    if which == "query":
        sees[place, 1] = False
        sees[place, 0] = True
    assert not np.isfinite(found[sees]).all(axis=1).any()
    np.testing.assert_array_equal(bits(found[~sees]), bits(expected[~sees]))


@pytest.mark.parametrize("kind", TYPES)
def test_infinite_rows_behind_a_window_are_not_seen(kind, ggml, instructions):
    query, key, value = rows_of(100, 2, 1, 64)
    key[:40], value[:40] = np.inf, np.inf
    session = Sessions(ggml, kind, 2, [key], [value], instructions=instructions, fill=LEAKED)
    assert np.isfinite(session.in_chunks(query, [100], window=10)[49:]).all()


@pytest.mark.parametrize(("dimensions", "kind"), [(1025, "f32"), (48, "q8_0"), (64, "q4_0")])
def test_what_the_kernel_can_not_take_is_left_to_ggml(dimensions, kind, ggml, instructions):
    assert kernel_of(ggml, kind, dimensions, only=instructions) is None


def test_without_noodles_own_library_ggml_attends(ggml, monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.kernels.library.own_library", lambda: None)
    assert kernel_of(ggml, "f16") is None
