"""KV rows: one allocation per session, growth without copies, a budget that names its numbers."""

import pytest
import torch

from noodle.errors import PositionGap, StepRefused
from services.stage.executors.kv_cache import KvCache
from services.stage.executors.transformers.kv_rows import SessionRows


def key_and_value(tokens, kv_heads=2, key_dim=4, value_dim=3):
    return torch.randn(1, kv_heads, tokens, key_dim), torch.randn(1, kv_heads, tokens, value_dim)


def limited_cache(budget_bytes, **options):
    cache = KvCache(SessionRows, kv_bytes_per_token=56, **options)
    cache.set_kv_budget(budget_bytes)
    return cache


def test_rows_are_allocated_once_and_growing_moves_nothing():
    rows = KvCache(SessionRows).reserve("a", 10, 10)
    first_key, first_value = key_and_value(4)
    keys, values = rows.write(0, 0, first_key, first_value)
    place = keys.data_ptr(), values.data_ptr()
    more_key, more_value = key_and_value(6)
    keys, values = rows.write(0, 4, more_key, more_value)
    assert (keys.data_ptr(), values.data_ptr()) == place
    assert torch.equal(keys, torch.cat([first_key, more_key], 2))
    assert torch.equal(values, torch.cat([first_value, more_value], 2))


def test_k_and_v_may_differ_in_shape_and_every_layer_has_its_own():
    cache = KvCache(SessionRows, kv_bytes_per_token=2 * 2 * (4 + 3) * 4)
    rows = cache.reserve("a", 10, 3)
    rows.write(3, 0, *key_and_value(3))
    rows.write(7, 0, *key_and_value(3))
    assert cache.bytes_allocated() == 2 * 10 * 2 * (4 + 3) * 4
    assert cache.kv_bytes_held() == cache.bytes_allocated() * 3 / 10


def test_rows_that_are_computed_again_take_the_same_place():
    rows = KvCache(SessionRows).reserve("a", 4, 4)
    rows.write(0, 0, *key_and_value(4))
    key, value = key_and_value(2)
    keys, _ = rows.write(0, 1, key, value)
    assert torch.equal(keys[:, :, 1:3], key)


def test_released_rows_are_no_longer_held_and_releasing_twice_is_fine():
    cache = KvCache(SessionRows)
    cache.reserve("a", 10, 1).write(0, 0, *key_and_value(1))
    assert cache.holds("a")
    cache.release("a")
    cache.release("a")
    assert cache.kv_bytes_held() == 0
    assert not cache.holds("a")


@pytest.mark.parametrize("reserves_upfront", [True, False])
def test_a_session_over_the_budget_is_refused_with_the_numbers_and_leaves_nothing(reserves_upfront):
    cache = limited_cache(1000, reserves_upfront=reserves_upfront)
    cache.reserve("a", 10, 10)
    with pytest.raises(StepRefused) as refusal:
        cache.reserve("b", 8, 8)
    assert refusal.value.reason == "kv_budget"
    for number in ("8 tokens", "448 bytes", "560", "1000"):
        assert number in str(refusal.value)
    assert not cache.holds("b")
    cache.release("a")
    cache.reserve("b", 17, 17)


def test_what_is_reserved_counts_only_where_memory_can_not_be_had_page_by_page():
    lazy = limited_cache(560)
    for name in "abcd":
        lazy.reserve(name, 1000, 2)
    lazy.reserve("a", 1000, 4)
    assert lazy.kv_bytes_held() == 560
    with pytest.raises(StepRefused):
        lazy.reserve("a", 1000, 5)
    eager = limited_cache(560, reserves_upfront=True)
    eager.reserve("a", 10, 1)
    with pytest.raises(StepRefused):
        eager.reserve("b", 1, 1)


def test_rows_take_memory_as_they_are_written():
    def anonymous_bytes():
        with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
            return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    cache = KvCache(SessionRows)
    before = anonymous_bytes()
    rows = cache.reserve("a", 100_000, 64)  # 51 MB each of K and V
    rows.write(0, 0, torch.ones(1, 2, 64, 64), torch.ones(1, 2, 64, 64))
    assert cache.bytes_allocated() > 100_000_000
    assert anonymous_bytes() - before < 5_000_000
    ones = torch.ones(1).expand(1, 2, 50_000, 64)  # without memory of its own, which the process may keep
    rows.write(0, 64, ones, ones)
    assert anonymous_bytes() - before > 40_000_000
    del rows
    cache.release("a")
    assert anonymous_bytes() - before < 5_000_000


def test_an_open_session_keeps_its_reservation():
    cache = limited_cache(560)
    assert cache.reserve("a", 10, 10) is cache.reserve("a", 10, 10)


def test_copied_rows_are_the_same_and_ones_own():
    cache = KvCache(SessionRows, kv_bytes_per_token=1)
    first = cache.reserve("a", 10, 6)
    first.write(0, 0, *key_and_value(6))
    first.length = 6
    cache.copy_rows("a", "b", 4, 20)
    second = cache.reserve("b", 20, 5)
    assert (second.length, second.counted_tokens) == (4, 5)
    assert torch.equal(second.keys[0][:, :, :4], first.keys[0][:, :, :4])
    second.write(0, 2, *key_and_value(1))
    assert not torch.equal(second.keys[0][:, :, 2], first.keys[0][:, :, 2])
    cache.release("a")
    assert torch.isfinite(second.keys[0][:, :, :4]).all()


def test_rows_that_are_not_there_can_not_be_copied():
    cache = KvCache(SessionRows)
    cache.reserve("a", 10, 6).length = 3
    for name in ("a", "nobody"):
        with pytest.raises(PositionGap):
            cache.copy_rows(name, "b", 4, 20)
        assert not cache.holds("b")


def test_a_gap_before_a_span_and_a_span_beyond_the_reservation_are_refused():
    cache = KvCache(SessionRows)
    rows = cache.reserve("a", 10, 10)
    rows.length = 4
    cache.check_span("a", rows, 4, 6)
    cache.check_span("a", rows, 0, 2)
    with pytest.raises(PositionGap):
        cache.check_span("a", rows, 5, 1)
    with pytest.raises(StepRefused) as refusal:
        cache.check_span("a", rows, 4, 7)
    assert refusal.value.reason == "beyond_reserve"
