import msgspec
import pytest
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import MachineReport, ModelShape, Plan, StageAssignment
from noodle.cluster.valkey import WorkQueue
from noodle.config.environment import planner_config
from noodle.errors import ConfigurationError
from noodle.metrics.counted import PlannerMetrics
from services.planner.app import watch
from services.planner.planning import Planning, check_settings, find_mismatch, find_self_pointing, still_holds

SHAPE = ModelShape("digest", "tiny", "llama", 6, 64, 300, 256, 4.0, (1,) * 6, 1, 1, 64)
STAGES = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{8081 + i}", 3 * i, 3 * i + 3, "float32") for i in range(2))
PLAN = Plan(1, "digest", 6, 64, 300, 256, STAGES)


def config(**variables):
    return planner_config({"NOODLE_CLUSTER_TOKEN": "x" * 20, **variables})


def report(stage_id, **changes):
    made = MachineReport(stage_id, "vm", f"http://127.0.0.1:{8081 + stage_id}", "boot", "0.2.0", "digest", "cpu", "cpu",
                         "float32", 1, 1 << 30, 0.001, 0.0001, 0.001)  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_a_plan_holds_while_its_stages_are_as_they_were_or_silent():
    assert still_holds(PLAN, SHAPE, [report(0), report(1)], config())
    assert still_holds(PLAN, SHAPE, [report(0, boot_id="another")], config())
    assert still_holds(PLAN, SHAPE, [], config())


@pytest.mark.parametrize("changes", [{"url": "http://127.0.0.1:9"}, {"dtype": "float16"}, {"machine": "b"}])
def test_a_stage_that_contradicts_the_plan_ends_it(changes):
    assert not still_holds(PLAN, SHAPE, [report(0), report(1, **changes)], config())


def test_another_model_context_split_or_number_of_stages_ends_the_plan():
    assert not still_holds(PLAN, msgspec.structs.replace(SHAPE, digest="other"), [], config())
    assert not still_holds(PLAN, msgspec.structs.replace(SHAPE, context_length=128), [], config())
    assert not still_holds(PLAN, SHAPE, [], config(NOODLE_SPLIT="4,2"))
    assert still_holds(PLAN, SHAPE, [], config(NOODLE_SPLIT="3,3"))
    assert not still_holds(PLAN, SHAPE, [], config(NOODLE_STAGES="1"))
    assert still_holds(PLAN, SHAPE, [], config(NOODLE_STAGES="3"))  # of those that are there, until the third joins


def test_a_stage_of_another_noodle_or_with_other_weights_is_named_with_its_cure():
    assert find_mismatch([report(0), report(1)], SHAPE) == ""
    older = find_mismatch([report(0), report(1, machine="pc", noodle_version="0.0.9")], SHAPE)
    assert older.startswith("Stage 1 on pc runs noodle 0.0.9, and the planner 0.2.0. Bring every machine to the same")
    other = find_mismatch([report(0, model_digest="another"), report(1)], SHAPE)
    assert other.startswith("Stage 0 on vm has other weights (another) than the coordinator's model tiny (digest).")
    assert "NOODLE_MODEL" in other


class OneQueue:
    """A Valkey with these reports that records the plans."""

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


def test_no_plan_is_made_with_a_mismatch_and_one_is_when_it_is_gone():
    queue = OneQueue([report(0), report(1, noodle_version="0.0.9")])
    planning = Planning(config(), queue)
    planning.shape = SHAPE
    planning._look()
    assert planning.state.phase == "failed"
    assert "0.0.9" in planning.current_state.detail
    assert not queue.plans
    queue._reports = [report(0), report(1)]
    planning._look()
    assert planning.state.phase == "planned"
    assert len(queue.plans) == 1


def test_settings_that_do_not_suit_the_model_are_refused_with_the_numbers():
    with pytest.raises(ConfigurationError, match=r"adds up to 8 layers.*has 6"):
        check_settings(SHAPE, config(NOODLE_SPLIT="4,4"))
    with pytest.raises(ConfigurationError, match=r"7 stages.*has 6 layers"):
        check_settings(SHAPE, config(NOODLE_STAGES="7"))


# membership


class Queue:
    """The part of Valkey that the planner reads; a test sets which stages are there."""

    def __init__(self, *reports):
        self.there, self.newest, self.version = list(reports), None, 0

    def reports(self):
        return list(self.there)

    def plan(self):
        return self.newest

    def next_plan_version(self):
        self.version += 1
        return self.version

    def put_plan(self, plan):
        self.newest = plan


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("services.planner.planning.time.monotonic", lambda: now[0])
    return now


def planning_of(queue, **variables):
    planning = Planning(config(NOODLE_STAGE_RETURN_SECONDS="20", **variables), queue)
    planning.shape = SHAPE
    planning._look()
    return planning


def layers_of(plan):
    return {stage.stage_id: stage.end_layer - stage.start_layer for stage in plan.stages}


def test_layers_move_from_a_stage_that_does_not_return_and_back_when_it_does(clock):
    queue = Queue(report(0), report(1))
    planning = planning_of(queue)
    assert layers_of(queue.newest) == {0: 3, 1: 3}
    queue.there = [report(0)]
    planning._look()
    clock[0] += 19
    planning._look()
    assert queue.newest.version == 1
    assert "Stage 1 on vm is away" in planning.state.detail
    clock[0] += 1
    planning._look()
    assert (queue.newest.version, layers_of(queue.newest)) == (2, {0: 6})
    clock[0] += 100
    planning._look()
    assert queue.newest.version == 2
    queue.there = [report(0), report(1)]
    planning._look()
    assert (queue.newest.version, layers_of(queue.newest)) == (3, {0: 3, 1: 3})


def test_a_stage_that_returns_in_time_keeps_its_layers(clock):
    queue = Queue(report(0), report(1))
    planning = planning_of(queue)
    for _ in range(3):
        queue.there = [report(0)]
        planning._look()
        clock[0] += 19
        queue.there = [report(0), report(1, boot_id="another")]
        planning._look()
    assert queue.newest.version == 1


def test_a_stage_that_leaves_is_not_waited_for(clock):
    queue = Queue(report(0), report(1))
    planning = planning_of(queue)
    queue.there = [report(0, leaving=True), report(1)]
    planning._look()
    assert layers_of(queue.newest) == {1: 6}


def test_without_room_on_the_remaining_stages_the_plan_stays_and_says_so(clock):
    shape = msgspec.structs.replace(SHAPE, layer_bytes=(1 << 20,) * 6)
    queue = Queue(report(0, free_bytes=5 << 20), report(1, free_bytes=5 << 20, machine="b"))
    planning = Planning(config(NOODLE_STAGE_RETURN_SECONDS="20"), queue)
    planning.shape = shape
    planning._look()
    queue.there = [report(0, free_bytes=5 << 20)]
    planning._look()
    clock[0] += 30
    planning._look()
    assert (queue.newest.version, planning.state.phase) == (1, "planned")
    assert "No plan is possible without it" in planning.state.detail


def test_layers_that_were_cut_by_hand_wait_for_their_stage(clock):
    queue = Queue(report(0), report(1))
    planning = planning_of(queue, NOODLE_SPLIT="4,2")
    queue.there = [report(0)]
    planning._look()
    clock[0] += 100
    planning._look()
    assert queue.newest.version == 1


def test_layers_stay_while_no_stage_is_there(clock):
    queue = Queue(report(0), report(1))
    planning = planning_of(queue)
    queue.there = []
    planning._look()
    clock[0] += 100
    planning._look()
    assert queue.newest.version == 1


def test_metrics_show_the_reporting_stages_and_the_prediction():
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


def test_a_stage_at_localhost_beside_one_on_the_network_is_refused_by_name():
    on_the_network = report(0, url="http://192.168.1.101:8081")
    problem = find_self_pointing([on_the_network, report(1, machine="pc", url="http://localhost:8081")])
    assert "Stage 1 on pc" in problem
    assert "NOODLE_ADVERTISE_URL" in problem


def test_stages_of_one_host_may_all_be_at_its_own_addresses():
    assert find_self_pointing([]) == ""
    assert find_self_pointing([report(0), report(1)]) == ""
    assert find_self_pointing([report(0, url="http://stage-0:8081"), report(1, url="http://stage-1:8081")]) == ""
    assert find_self_pointing([report(0, url="http://10.0.0.1:1"), report(1, url="http://10.0.0.2:1")]) == ""
