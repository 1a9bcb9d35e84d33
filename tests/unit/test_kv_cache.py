"""KV rows: one allocation per session, growth without copies, a budget that names its numbers."""

import pytest
import torch

from noodle.errors import PositionGap, StepRefused
from services.stage.kv_cache import KvCache


def key_and_value(tokens, kv_heads=2, key_dim=4, value_dim=3):
    return torch.randn(1, kv_heads, tokens, key_dim), torch.randn(1, kv_heads, tokens, value_dim)


def test_rows_are_allocated_once_and_growing_moves_nothing():
    rows = KvCache().open("a", 10)
    first_key, first_value = key_and_value(4)
    keys, values = rows.write(0, 0, first_key, first_value)
    place = keys.data_ptr(), values.data_ptr()
    more_key, more_value = key_and_value(6)
    keys, values = rows.write(0, 4, more_key, more_value)
    assert (keys.data_ptr(), values.data_ptr()) == place
    assert torch.equal(keys, torch.cat([first_key, more_key], 2))
    assert torch.equal(values, torch.cat([first_value, more_value], 2))


def test_k_and_v_may_differ_in_shape_and_every_layer_has_its_own():
    cache = KvCache()
    rows = cache.open("a", 10)
    rows.write(3, 0, *key_and_value(1))
    rows.write(7, 0, *key_and_value(1))
    assert cache.bytes_held() == 2 * 10 * 2 * (4 + 3) * 4


def test_rows_that_are_computed_again_take_the_same_place():
    rows = KvCache().open("a", 4)
    rows.write(0, 0, *key_and_value(4))
    key, value = key_and_value(2)
    keys, _ = rows.write(0, 1, key, value)
    assert torch.equal(keys[:, :, 1:3], key)


def test_released_rows_are_no_longer_held_and_releasing_twice_is_fine():
    cache = KvCache()
    cache.open("a", 10).write(0, 0, *key_and_value(1))
    assert cache.holds("a")
    cache.release("a")
    cache.release("a")
    assert cache.bytes_held() == 0
    assert not cache.holds("a")


def test_a_session_over_the_budget_is_refused_with_the_numbers_and_leaves_nothing():
    cache = KvCache(budget_bytes=1000, bytes_per_token=56)
    cache.open("a", 10)
    with pytest.raises(StepRefused) as refusal:
        cache.open("b", 8)
    assert refusal.value.reason == "kv_budget"
    for number in ("8 tokens", "448 bytes", "560", "1000"):
        assert number in str(refusal.value)
    assert not cache.holds("b")
    cache.release("a")
    cache.open("b", 17)


def test_an_open_session_keeps_its_reservation():
    cache = KvCache(budget_bytes=560, bytes_per_token=56)
    assert cache.open("a", 10) is cache.open("a", 10)


def test_a_gap_before_a_span_and_a_span_beyond_the_reservation_are_refused():
    cache = KvCache()
    rows = cache.open("a", 10)
    rows.length = 4
    cache.check_span("a", rows, 4, 6)
    cache.check_span("a", rows, 0, 2)
    with pytest.raises(PositionGap):
        cache.check_span("a", rows, 5, 1)
    with pytest.raises(StepRefused) as refusal:
        cache.check_span("a", rows, 4, 7)
    assert refusal.value.reason == "beyond_reserve"
