"""What a chunk costs is learnt from measured chunks of any size, and prompts are cut better than in simpler ways."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.engine.chunk_costs import ChunkCosts, chunk_shares, pipeline_seconds

STEP_SECONDS = 0.02


def learnt(chunks, fixed, each, per_row, *, repeated=10):
    """Costs learnt from chunks (tokens, rows before them) on a stage with these parameters."""
    costs = ChunkCosts(STEP_SECONDS)
    for _ in range(repeated):
        for tokens, first in chunks:
            rows = first + tokens / 2
            costs.add(tokens, rows, fixed + tokens * (each + per_row * rows), STEP_SECONDS)
    return costs


def test_chunks_of_different_sizes_teach_the_fixed_part_even_if_it_differs_from_a_decode_step():
    costs = learnt([(500, 0), (300, 500), (200, 800), (100, 1000), (50, 1100)], 0.05, 0.002, 1e-6)
    assert costs.fixed_seconds == pytest.approx(0.05, rel=0.05)
    assert costs.seconds(0, 1000) == pytest.approx(1000 * (0.002 + 1e-6 * 500), rel=0.02)


def test_with_chunks_of_one_size_the_fixed_part_is_taken_from_decode_steps():
    costs = learnt([(100, 0), (100, 100), (100, 200)], STEP_SECONDS, 0.002, 1e-6)
    assert costs.fixed_seconds == pytest.approx(STEP_SECONDS, rel=0.3)


def test_tokens_within_some_seconds_take_that_long():
    costs = learnt([(500, 0), (300, 500), (50, 800)], 0.05, 0.002, 1e-6)
    tokens = costs.tokens_within(400, 0.7)
    assert costs.seconds(400, 400 + tokens) == pytest.approx(0.7, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 4000), st.floats(0, 1e5), st.floats(1e-6, 1e3)), max_size=30))
def test_no_part_is_negative_for_any_measurements(measured):
    costs = ChunkCosts(STEP_SECONDS)
    for tokens, rows, seconds in measured:
        costs.add(tokens, rows, seconds, STEP_SECONDS)
    assert costs.fixed_seconds >= 0
    assert costs.seconds(10, 500) >= 0
    assert costs.tokens_within(10, 0.5) >= 0


STAGES = st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.001, 10.0)), min_size=1, max_size=5)


def test_one_stage_takes_a_prompt_whole():
    assert chunk_shares([0.02], [3.0], 100, 0.01) == (1.0,)


def test_pipeline_seconds_are_those_of_chunks_that_follow_one_another():
    assert pipeline_seconds([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]) == pytest.approx(1.5)
    assert pipeline_seconds([0.1, 0.1], [1.0, 2.0], [0.5, 0.5]) == pytest.approx(0.6 + 1.1 + 1.1)


def test_two_unequal_stages_are_faster_than_with_equal_chunks():
    fixed, work = [0.025, 0.035], [3.6, 2.75]
    equal = min(pipeline_seconds(fixed, work, [1 / count] * count) for count in range(1, 20))
    assert pipeline_seconds(fixed, work, chunk_shares(fixed, work, 20, 0.02)) < 0.97 * equal


@given(STAGES, st.integers(1, 64), st.floats(0.01, 0.5))
def test_for_any_costs_the_shares_sum_to_one_and_are_no_worse_than_one_chunk(costs, most, smallest):
    fixed, work = zip(*costs, strict=True)
    shares = chunk_shares(fixed, work, most, smallest)
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) <= most
    assert len(shares) == 1 or min(shares) >= smallest
    assert pipeline_seconds(fixed, work, shares) <= pipeline_seconds(fixed, work, [1.0]) + 1e-9
    ratios = {round(after / before, 6) for before, after in itertools.pairwise(shares)}
    assert len(ratios) <= 1  # each is the same multiple of the one before
