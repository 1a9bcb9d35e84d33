"""Which steps `noodle profile` times, and how often."""

import pytest

from services.stage.tools import profile_points
from services.stage.tools.profile_points import (
    FULL,
    QUICK,
    Point,
    fitting_kv_tokens,
    layer_points,
    repeated,
    thread_counts,
)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (2, 1)), (6, (6, 1, 2, 4)), (8, (8, 1, 2, 4)), (3, (3, 1, 2))]
)
def test_the_most_threads_come_first_then_one_and_its_doubles(most, expected):
    assert thread_counts(most) == expected


def test_every_batch_and_length_is_timed_with_every_number_of_threads():
    points = layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 4096)
    assert len(points) == len(set(points)) == 2 * (5 * 4 + 5 * 4)


def test_the_points_that_compare_threads_are_timed_first():
    points = layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 512)
    assert points[:4] == [
        Point(2, "decode", 1, 128),
        Point(2, "prefill", 1, 128),
        Point(1, "decode", 1, 128),
        Point(1, "prefill", 1, 128),
    ]
    assert {point.threads for point in points[4 : len(points) // 2]} == {2}


def test_no_chunk_passes_a_step_or_the_context():
    points = layer_points(FULL, (1,), FULL.kv_tokens, 256, 512)
    prefill = [point for point in points if point.kind == "prefill"]
    assert max(point.sessions * point.length for point in prefill) == 512
    assert max(point.length for point in prefill) == 256


def test_rows_stay_within_context_and_memory():
    assert fitting_kv_tokens(FULL, 8192, 1 << 30) == FULL.kv_tokens
    assert fitting_kv_tokens(FULL, 1024, 1 << 30) == (16, 128, 512)
    assert fitting_kv_tokens(FULL, 8192, 8 * 513) == (16, 128, 512)
    assert fitting_kv_tokens(FULL, 8192, 0) == ()


def test_without_room_for_any_row_prefill_is_timed_all_the_same():
    assert {point.kind for point in layer_points(QUICK, (1,), (), 8192, 512)} == {"prefill"}


def test_a_quick_profile_is_a_part_of_the_full_one():
    full = set(layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 512))
    assert set(layer_points(QUICK, (2, 1), QUICK.kv_tokens, 8192, 512)) < full


def test_a_fast_step_is_repeated_and_each_column_has_its_median():
    rounds = iter([(3.0e-6, 1.0e-6), (1.0e-6, 9.0e-6), (2.0e-6, 2.0e-6)])
    assert repeated(lambda: next(rounds), 3) == ((2.0e-6, 2.0e-6), 3)


def test_a_slow_step_is_done_once():
    assert repeated(lambda: (1.5, 1.5), 15) == ((1.5, 1.5), 1)


def test_rounds_end_with_the_points_time_but_not_below_the_minimum(monkeypatch):
    monkeypatch.setattr(profile_points, "POINT_SECONDS", 0.0)
    assert repeated(lambda: (0.1,), 15)[1] == profile_points.MINIMUM_ROUNDS
