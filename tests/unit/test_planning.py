import msgspec
import pytest

from noodle.config import planner_config
from noodle.errors import ConfigurationError
from noodle.plan import MachineReport, ModelShape, Plan, StageAssignment
from services.planner.planning import Planning, check_wishes, still_holds, strangers_among

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


def test_a_stage_of_another_noodle_or_with_other_weights_is_named_with_its_cure():
    assert strangers_among([report(0), report(1)], SHAPE) == ""
    older = strangers_among([report(0), report(1, machine="pc", noodle_version="0.0.9")], SHAPE)
    assert older.startswith("Stage 1 on pc runs noodle 0.0.9, and the planner 0.1.0. Bring every machine to the same")
    other = strangers_among([report(0, model_digest="another"), report(1)], SHAPE)
    assert other.startswith("Stage 0 on vm has other weights (another) than the coordinator's model tiny (digest).")
    assert "NOODLE_MODEL" in other


class OneQueue:
    """Valkey with these reports; what is written there."""

    def __init__(self, reports):
        self._reports, self.plans = reports, []

    def reports(self):
        return self._reports

    def plan(self):
        return self.plans[-1] if self.plans else None

    def next_plan_version(self):
        return len(self.plans) + 1

    def put_plan(self, plan):
        self.plans.append(plan)


def test_no_plan_is_made_with_a_stranger_and_one_is_when_it_has_come_round():
    queue = OneQueue([report(0), report(1, noodle_version="0.0.9")])
    planning = Planning(config(), queue)
    planning.shape = SHAPE
    planning._look()
    assert planning.state.phase == "failed"
    assert "0.0.9" in planning.told_state.detail
    assert not queue.plans
    queue._reports = [report(0), report(1)]
    planning._look()
    assert planning.state.phase == "planned"
    assert len(queue.plans) == 1


def test_wishes_that_nothing_can_fulfil_are_refused_with_the_numbers():
    with pytest.raises(ConfigurationError, match=r"adds up to 8 layers.*has 6"):
        check_wishes(SHAPE, config(NOODLE_SPLIT="4,4"))
    with pytest.raises(ConfigurationError, match=r"7 stages.*has 6 layers"):
        check_wishes(SHAPE, config(NOODLE_STAGES="7"))
