"""Costs of steps that are learnt from results, and how work is cut by them."""

import pytest

from noodle.wire.messages import StageTiming
from services.coordinator.engine import step_costs
from services.coordinator.engine.step_costs import (
    DECODE_GAP_SECONDS,
    SMALLEST_CHUNK_TOKENS,
    TRIAL_INTERVAL_STEPS,
    StepCosts,
)
from tests.support.sequences import plan_limits


def costs_of(*stages, tokens=(1, 4, 16)):
    """Costs learnt from many decode steps of stages of these (fixed, per token) seconds."""
    costs = StepCosts(plan_limits(len(stages), decode_seconds=0.05))
    for _ in range(80):  # fewer than TRIAL_INTERVAL_STEPS
        for count in tokens:
            timings = [StageTiming(i, 0.0, fixed + per * count, 0.0) for i, (fixed, per) in enumerate(stages)]
            costs.add_decode(count, timings)
    return costs


def chunk_costs_of(*stages, chunk=100):
    """Costs learnt from equal chunks on stages of these (fixed, per token, per token and row) seconds."""
    costs = costs_of(*((fixed, 0.0) for fixed, _, _ in stages), tokens=(1,))
    for _ in range(20):
        for first in range(0, 2000, chunk):
            rows = first + chunk / 2
            timings = [
                StageTiming(i, 0.0, fixed + chunk * (per + row * rows), 0.0)
                for i, (fixed, per, row) in enumerate(stages)
            ]
            costs.add_chunks(chunk, rows, timings)
    return costs


def cut(costs, end, *, first=0, others_decode=False):
    """The sizes of a prompt's chunks, in order."""
    chunks, at, ends = [], first, costs.chunk_ends(first, end)
    while at < end:
        chunks.append(costs.chunk_tokens(at, ends, others_decode=others_decode))
        at += chunks[-1]
    assert at == end
    return chunks


def test_a_line_is_learnt_and_the_prior_is_forgotten():
    costs = costs_of((0.02, 0.003), (0.03, 0.001))
    assert costs._decode[0].seconds(4) == pytest.approx(0.032, rel=1e-3)
    assert costs._decode[1].seconds(10) == pytest.approx(0.04, rel=1e-3)


def test_if_tokens_are_expensive_the_stages_work_at_the_same_time():
    assert costs_of((0.001, 0.01), (0.001, 0.01)).micro_batches(8) == 2


def test_if_one_stage_does_nearly_all_one_step_is_best():
    assert costs_of((0.05, 0.0001), (0.0005, 0.0001)).micro_batches(8) == 1


def test_there_are_no_more_steps_than_sequences_or_stages():
    costs = costs_of(*[(0.001, 0.01)] * 4)
    assert [costs.micro_batches(count) for count in (1, 2, 3, 8)] == [1, 2, 3, 4]


def test_a_long_prompt_is_cut_finely_if_a_chunks_fixed_part_is_small():
    cheap, dear = (chunk_costs_of((fixed, 0.001, 0), (fixed, 0.001, 0)) for fixed in (0.01, 0.3))
    assert len(cut(cheap, 2000)) == pytest.approx(14, abs=1)
    assert len(cut(dear, 2000)) == pytest.approx(3, abs=1)


def test_on_equal_stages_chunks_cost_the_same_though_later_tokens_attend_to_more_rows():
    stage = (0.02, 0.001, 1e-6)
    chunks, first, seconds = cut(chunk_costs_of(stage, stage), 2000), 0, []
    for count in chunks:
        seconds.append(count * (stage[1] + stage[2] * (first + count / 2)))
        first += count
    assert chunks == sorted(chunks, reverse=True)
    assert max(seconds) < 1.1 * min(seconds)


def test_a_prompt_with_a_reused_prefix_is_cut_by_its_rest():
    costs = chunk_costs_of((0.02, 0.001, 0), (0.02, 0.001, 0))
    assert len(cut(costs, 2000, first=1600)) < len(cut(costs, 2000))


def test_chunks_are_small_at_first_before_a_slow_stage_and_at_last_behind_one():
    slow, quick = (0.02, 0.002, 0), (0.015, 0.0014, 0)
    shrinking, growing = cut(chunk_costs_of(slow, quick), 2000), cut(chunk_costs_of(quick, slow), 2000)
    assert shrinking == sorted(shrinking, reverse=True)
    assert growing == sorted(growing)
    assert shrinking[0] > 2 * shrinking[-1]
    assert growing[-1] > 2 * growing[0]


def test_one_stage_takes_a_prompt_whole_unless_it_delays_others():
    costs = chunk_costs_of((0.01, 0.001, 0))
    assert cut(costs, 500) == [500]
    assert cut(costs, 500, others_decode=True)[0] == pytest.approx((DECODE_GAP_SECONDS - 0.01) / 0.001, rel=0.05)
    slow = chunk_costs_of((0.3, 0.1, 0))
    assert cut(slow, 500, others_decode=True)[0] == SMALLEST_CHUNK_TOKENS


def test_chunks_beside_streams_are_smaller_with_more_stages_as_a_token_waits_for_a_step_on_each():
    one, two = chunk_costs_of((0.01, 0.001, 0)), chunk_costs_of((0.01, 0.001, 0), (0.01, 0.001, 0))
    ratio = cut(one, 2000, others_decode=True)[0] / cut(two, 2000, others_decode=True)[0]
    assert ratio == pytest.approx((DECODE_GAP_SECONDS - 0.01) / (DECODE_GAP_SECONDS / 2 - 0.01), rel=0.05)


def test_chunks_beside_streams_are_not_so_small_that_most_of_their_time_is_the_reading_of_weights():
    costs = chunk_costs_of((1.0, 0.01, 0), (0.2, 0.002, 0))
    assert cut(costs, 500, others_decode=True)[0] == pytest.approx(100, rel=0.05)


def test_timings_of_fewer_stages_than_the_plan_has_teach_nothing():
    costs = StepCosts(plan_limits(2, decode_seconds=0.05))
    before = costs._decode[0].seconds(1)
    costs.add_decode(1, [StageTiming(0, 0.0, 9.0, 0.0)])
    assert costs._decode[0].seconds(1) == before


def test_costs_that_jump_are_known_by_their_number_of_tokens():
    """As on a CPU, where one row has another kernel than more, and four cost no more than two."""
    costs = StepCosts(plan_limits(2, decode_seconds=0.05))
    seconds = {1: 0.015, 2: 0.024, 4: 0.020, 8: 0.021}
    for _ in range(5):
        for count, each in seconds.items():
            costs.add_decode(count, [StageTiming(i, 0.0, each, 0.0) for i in range(2)])
    assert [costs.micro_batches(count) for count in (2, 4, 8)] == [2, 1, 2]


def test_every_cut_is_tried_at_times():
    costs = StepCosts(plan_limits(2, decode_seconds=0.05))
    tried = set()
    for _ in range(3 * TRIAL_INTERVAL_STEPS):
        tried.add(costs.micro_batches(8))
        costs.add_decode(4, [StageTiming(i, 0.0, 0.02, 0.0) for i in range(2)])
    assert tried == {1, 2}


def test_cuts_of_a_bounded_number_of_prompts_are_remembered_until_a_chunk_is_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(step_costs, "chunk_shares", lambda *_: asked.append(1) or (1.0,))
    monkeypatch.setattr(step_costs, "KNOWN_ENDS", 3)
    costs = StepCosts(plan_limits(2, decode_seconds=0.05))
    for _ in range(5):
        assert costs.chunk_ends(0, 500) == (500,)
    assert len(asked) == 1
    costs.add_chunks(100, 50.0, [StageTiming(i, 0.0, 0.1, 0.0) for i in range(2)])
    costs.chunk_ends(0, 500)
    assert len(asked) == 2
    for end in range(100, 120):
        costs.chunk_ends(0, end)
    assert len(costs._ends) <= 3
