import msgspec
import pytest

from noodle.cluster.plan import Plan, StageAssignment
from services.planner.prediction import HopCost, describe, planned_token_seconds, predict
from tests.unit.planner.test_partition import a_machine


def stages(*counts: int) -> list[StageAssignment]:
    made, start = [], 0
    for stage_id, count in enumerate(counts):
        made.append(StageAssignment(stage_id, "m", "http://m", start, start + count, "float32"))
        start += count
    return made


MACHINES = {
    0: a_machine(0, decode_layer_seconds=0.001, prefill_layer_seconds_per_token=0.0001),
    1: a_machine(1, decode_layer_seconds=0.002, prefill_layer_seconds_per_token=0.0004, head_decode_seconds=0.005),
}


def test_a_token_waits_for_every_stage_and_every_hop() -> None:
    prediction = predict(stages(8, 4), MACHINES, HopCost(0.0005, "measured"))
    assert prediction.stage_seconds == pytest.approx((0.008, 0.013))
    assert prediction.token_seconds == pytest.approx(0.008 + 0.013 + 3 * 0.0005)
    assert prediction.steady_token_seconds == pytest.approx(0.013)


def test_a_plan_predicts_the_same_token_seconds_without_its_machines() -> None:
    hop = HopCost(0.0005, "measured")
    prediction = predict(stages(8, 4), MACHINES, hop)
    known = [
        msgspec.structs.replace(stage, decode_seconds=seconds)
        for stage, seconds in zip(stages(8, 4), prediction.stage_seconds, strict=True)
    ]
    plan = Plan(1, "digest", 12, 64, 300, 256, tuple(known))
    assert planned_token_seconds(plan, hop) == pytest.approx(prediction.token_seconds)


def test_the_slowest_stage_sets_the_pace_of_a_prompt() -> None:
    assert predict(stages(8, 4), MACHINES, HopCost(0.0, "measured")).prefill_tokens_per_second == pytest.approx(625)


def test_one_assumed_number_makes_the_prediction_assumed() -> None:
    assert predict(stages(8, 4), MACHINES, HopCost(0.0, "measured")).source == "measured"
    assert predict(stages(8, 4), MACHINES, HopCost(0.0, "assumed")).source == "assumed"


def test_the_description_has_the_time_of_the_slowest_stage() -> None:
    words = describe(predict(stages(8, 4), MACHINES, HopCost(0.0, "measured")))
    assert "slowest of 2 stages takes 13.0 ms" in words
    assert "measured" in words
