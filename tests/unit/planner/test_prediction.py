import msgspec
import pytest

from noodle.cluster.plan import FormatSeconds, Plan, StageAssignment
from services.planner.prediction import Gain, HopCost, describe, faster_format, planned_token_seconds, predict
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


def offering(**layer_milliseconds: float) -> dict[int, object]:
    """Two machines with 10 ms a layer and 1 ms for a prompt's token, which predict these formats."""
    formats = {
        name: FormatSeconds(milliseconds / 1e3, milliseconds / 1e4, 0.0, 50.0)
        for name, milliseconds in layer_milliseconds.items()
    }
    known = {"decode_layer_seconds": 0.01, "prefill_layer_seconds_per_token": 0.001, "layer_weight_bytes": 100.0}
    return {stage_id: a_machine(stage_id, other_formats=formats, **known) for stage_id in (0, 1)}


ROOM = {0: 0.0, 1: 0.0}


def test_a_format_that_is_clearly_faster_on_all_stages_is_named_with_its_gain() -> None:
    gain = faster_format(stages(8, 4), offering(q8_0=5.0), ROOM)
    assert gain == Gain("q8_0", pytest.approx(2.0), pytest.approx(2.0))
    assert faster_format(stages(8, 4), offering(q8_0=9.5), ROOM) is None
    assert faster_format(stages(8, 4), offering(), ROOM) is None
    half = {0: offering(q8_0=5.0)[0], 1: offering()[1]}
    assert faster_format(stages(8, 4), half, ROOM) is None


def test_of_two_formats_the_more_precise_one_is_named_unless_the_other_is_clearly_faster() -> None:
    close = faster_format(stages(8, 4), offering(q8_0=5.0, q4_0=4.8), ROOM)
    far = faster_format(stages(8, 4), offering(q8_0=5.0, q4_0=2.5), ROOM)
    assert close is not None
    assert far is not None
    assert (close.weights, far.weights) == ("q8_0", "q4_0")


def test_a_format_that_has_no_room_is_not_named() -> None:
    larger = {
        stage_id: msgspec.structs.replace(machine, layer_weight_bytes=20.0)
        for stage_id, machine in offering(q8_0=5.0).items()
    }
    assert faster_format(stages(8, 4), larger, {0: 8 * 30.0, 1: 4 * 30.0}) is not None
    assert faster_format(stages(8, 4), larger, {0: 8 * 30.0, 1: 4 * 30.0 - 1}) is None


def test_the_heads_seconds_count_on_the_last_stage() -> None:
    formats = {"q8_0": FormatSeconds(0.01, 0.001, 0.0, 0.0)}
    known = {"decode_layer_seconds": 0.01, "prefill_layer_seconds_per_token": 0.001, "head_decode_seconds": 0.24}
    machines = {stage_id: a_machine(stage_id, other_formats=formats, **known) for stage_id in (0, 1)}
    gain = faster_format(stages(8, 4), machines, ROOM)
    assert gain == Gain("q8_0", pytest.approx(3.0), pytest.approx(1.0))
