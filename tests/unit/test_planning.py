import msgspec
import pytest
from prometheus_client import CollectorRegistry

from noodle.config import planner_config
from noodle.errors import ConfigurationError
from noodle.metrics import PlannerMetrics
from noodle.plan import MachineReport, ModelShape, Plan, StageAssignment
from noodle.work_queue import WorkQueue
from services.planner.app import watch
from services.planner.planning import Planning, check_wishes, still_holds

SHAPE = ModelShape("digest", "tiny", "llama", 6, 64, 300, 256, 4.0, (1,) * 6, 1, 1, 64)
STAGES = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{8081 + i}", 3 * i, 3 * i + 3, "float32") for i in range(2))
PLAN = Plan(1, "digest", 6, 64, 300, 256, STAGES)


def config(**variables):
    return planner_config({"NOODLE_CLUSTER_TOKEN": "x" * 20, **variables})


def report(stage_id, **changes):
    made = MachineReport(stage_id, "vm", f"http://127.0.0.1:{8081 + stage_id}", "boot", "0.1.0", "digest", "cpu", "cpu",
                         "float32", 1, 1 << 30, 0.001, 0.0001, 0.001)  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_a_plan_holds_while_its_stages_are_as_they_were_or_silent():
    assert still_holds(PLAN, SHAPE, [report(0), report(1)], config())
    assert still_holds(PLAN, SHAPE, [report(0, boot_id="another")], config())
    assert still_holds(PLAN, SHAPE, [], config())


@pytest.mark.parametrize("changes", [{"url": "http://127.0.0.1:9"}, {"dtype": "float16"}, {"machine": "b"}])
def test_a_stage_that_says_otherwise_ends_the_plan(changes):
    assert not still_holds(PLAN, SHAPE, [report(0), report(1, **changes)], config())


def test_another_model_context_split_or_number_of_stages_ends_the_plan():
    assert not still_holds(PLAN, msgspec.structs.replace(SHAPE, digest="other"), [], config())
    assert not still_holds(PLAN, msgspec.structs.replace(SHAPE, context_length=128), [], config())
    assert not still_holds(PLAN, SHAPE, [], config(NOODLE_SPLIT="4,2"))
    assert still_holds(PLAN, SHAPE, [], config(NOODLE_SPLIT="3,3"))
    assert not still_holds(PLAN, SHAPE, [], config(NOODLE_STAGES="3"))


def test_wishes_that_nothing_can_fulfil_are_refused_with_the_numbers():
    with pytest.raises(ConfigurationError, match=r"adds up to 8 layers.*has 6"):
        check_wishes(SHAPE, config(NOODLE_SPLIT="4,4"))
    with pytest.raises(ConfigurationError, match=r"7 stages.*has 6 layers"):
        check_wishes(SHAPE, config(NOODLE_STAGES="7"))


def test_metrics_show_who_reports_and_what_the_plan_predicts():
    registry = CollectorRegistry()
    planning = Planning(config(), WorkQueue("redis://127.0.0.1:1", ""))
    watch(planning, 2, PlannerMetrics(registry))
    assert registry.get_sample_value("noodle_plan_version") == 0
    planning.reports = [report(0), report(1), report(2, machine="b")]
    planning.plan = msgspec.structs.replace(
        PLAN, stages=tuple(msgspec.structs.replace(stage, decode_seconds=0.01) for stage in STAGES)
    )
    values = {
        name: registry.get_sample_value(f"noodle_{name}")
        for name in ("planner_machines", "planner_stages", "planner_wanted_stages", "plan_version")
    }
    assert values == {"planner_machines": 2, "planner_stages": 3, "planner_wanted_stages": 2, "plan_version": 1}
    # two stages, and three hops of the millisecond that is assumed
    assert registry.get_sample_value("noodle_plan_predicted_token_seconds") == pytest.approx(0.023)
