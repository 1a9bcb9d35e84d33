"""How a prompt is cut: what the stages then take is held against simpler cuts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.engine.prompt_chunks import chunk_shares, pipeline_seconds

seconds = st.floats(0.001, 10.0)
stages = st.lists(st.tuples(st.floats(0.0, 0.5), seconds), min_size=1, max_size=5)


def test_one_stage_takes_a_prompt_whole():
    assert chunk_shares([0.02], [3.0], 100, 0.01) == (1.0,)


def test_a_pipelines_seconds_are_those_of_its_chunks_one_behind_the_other():
    assert pipeline_seconds([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]) == pytest.approx(1.5)
    assert pipeline_seconds([0.1, 0.1], [1.0, 2.0], [0.5, 0.5]) == pytest.approx(0.6 + 1.1 + 1.1)


def test_two_unequal_stages_come_closer_to_the_slow_ones_own_time_than_by_equal_chunks():
    fixed, work = [0.025, 0.035], [3.6, 2.75]
    equal = min(pipeline_seconds(fixed, work, [1 / count] * count) for count in range(1, 20))
    assert pipeline_seconds(fixed, work, chunk_shares(fixed, work, 20, 0.02)) < 0.97 * equal


@given(stages, st.integers(1, 64), st.floats(0.01, 0.5))
def test_whatever_the_costs_the_shares_are_a_whole_and_no_worse_than_no_cut(costs, most, smallest):
    fixed, work = zip(*costs, strict=True)
    shares = chunk_shares(fixed, work, most, smallest)
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) <= most
    assert len(shares) == 1 or min(shares) >= smallest
    assert pipeline_seconds(fixed, work, shares) <= pipeline_seconds(fixed, work, [1.0]) + 1e-9
    ratios = {round(after / before, 6) for before, after in itertools.pairwise(shares)}
    assert len(ratios) <= 1  # each is the same multiple of the one before
