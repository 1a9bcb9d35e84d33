import msgspec
import pytest

from noodle.config import planner_config
from noodle.errors import ConfigurationError
from noodle.plan import MachineReport, ModelShape, Plan, StageAssignment
from services.planner.planning import check_wishes, self_pointing_among, still_holds

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


def test_a_stage_at_localhost_beside_one_on_the_network_is_refused_by_name():
    on_the_network = report(0, url="http://192.168.1.101:8081")
    told = self_pointing_among([on_the_network, report(1, machine="pc", url="http://localhost:8081")])
    assert "Stage 1 on pc" in told
    assert "NOODLE_ADVERTISE_URL" in told


def test_stages_of_one_host_may_all_be_at_its_own_addresses():
    assert self_pointing_among([]) == ""
    assert self_pointing_among([report(0), report(1)]) == ""
    assert self_pointing_among([report(0, url="http://stage-0:8081"), report(1, url="http://stage-1:8081")]) == ""
    assert self_pointing_among([report(0, url="http://10.0.0.1:1"), report(1, url="http://10.0.0.2:1")]) == ""
