from noodle.cluster.plan import Plan, PlannerState, StageAssignment, StageState
from services.coordinator.leadership import (
    ClusterView,
    disagreement_of,
    limits_of,
    progress_of,
    waiting_for,
    warnings_of,
)

STAGES = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{8081 + i}", 3 * i, 3 * i + 3, "float32") for i in range(2))
PLAN = Plan(4, "digest", 6, 64, 300, 256, STAGES)


def state(stage_id, phase, **more):
    return StageState(stage_id, "vm", "boot", phase, **more)


def a_view(**changes):
    return ClusterView(**{"planner": PlannerState("planned", "", 4), "plan": PLAN, **changes})


def waits(view, leads=True, detail="connecting", up=False):
    return waiting_for(view, leads, detail, up)


def test_pending_conditions_are_listed_in_the_order_in_which_they_must_happen():
    assert waits(a_view(), up=True) == []
    assert waits(a_view(queue_error="Valkey does not answer")) == ["Valkey does not answer"]
    assert "b/2" in waits(a_view(leader="b/2"), leads=False)[0]
    assert waits(a_view(planner=None)) == ["the planner to answer"]
    unplanned = a_view(plan=None, planner=PlannerState("waiting", "1 of 2"), stages={0: state(0, "measuring")})
    assert waits(unplanned)[0] == "the plan: 1 of 2"
    assert "measuring" in waits(unplanned)[1]
    loading = a_view(
        stages={
            0: state(0, "ready", ready_version=4),
            1: state(1, "loading", detail="loading layers 2 to 3, 1 of 2 MB"),
        }
    )
    assert waits(loading) == ["stage 1 on vm: loading layers 2 to 3, 1 of 2 MB"]
    older = {0: state(0, "ready", ready_version=4), 1: state(1, "ready", ready_version=3, detail="layers 2 to 3")}
    assert waits(a_view(stages=older)) == ["stage 1 on vm: ready layers 2 to 3"]
    assert waits(a_view(stages={0: state(0, "ready", ready_version=4)})) == ["stage 1 on vm to answer"]
    ready = {index: state(index, "ready", ready_version=4) for index in range(2)}
    assert waits(a_view(stages=ready)) == ["connecting"]


def test_a_stage_that_is_ready_for_an_older_plan_is_waited_for():
    stages = {index: state(index, "ready", ready_version=3) for index in range(2)}
    assert len(waits(a_view(stages=stages))) == 2


def test_progress_grows_from_phase_to_phase_and_is_whole_only_when_up():
    steps = [
        progress_of(a_view(stages={0: state(0, phase, progress=part)}), up=False)
        for phase, part in (("starting", 0), ("measuring", 0.2), ("waiting", 0), ("loading", 0.5), ("ready", 1))
    ]
    assert steps == sorted(steps)
    assert steps[-1] < 1
    assert progress_of(a_view(), up=True) == 1


def test_the_tightest_stage_decides_how_many_tokens_fit():
    states = [
        state(0, "ready", kv_budget_bytes=1000, kv_bytes_per_token=10),
        state(1, "ready", kv_budget_bytes=900, kv_bytes_per_token=30),
    ]
    limits = limits_of(PLAN, states)
    assert (limits.kv_tokens, limits.stage_count, limits.plan_version) == (30, 2, 4)


def test_stages_with_another_transport_than_the_coordinator_are_named():
    states = [state(0, "ready", transport="auto"), state(1, "ready", transport="direct")]
    assert disagreement_of(states[:1], "auto") == ""
    said = disagreement_of(states, "auto")
    assert "stage 1 on vm has direct" in said
    assert "coordinator has auto" in said
    assert "stage 0" not in said
    ready = {index: state(index, "ready", ready_version=4) for index in range(2)}
    assert waits(a_view(stages=ready, disagreement=said)) == [said]


def test_less_room_for_kv_rows_than_the_context_is_a_warning_with_the_stage_and_the_numbers():
    def view(*tokens, version=4):
        rooms = [{"kv_budget_bytes": each * 10 + 5, "kv_bytes_per_token": 10} for each in tokens]
        return a_view(stages={i: state(i, "ready", ready_version=version, **room) for i, room in enumerate(rooms)})

    (warning,) = warnings_of(view(300, 100))
    assert "Stage 1 on vm" in warning
    assert "100 tokens" in warning
    assert "context of 256" in warning
    assert "NOODLE_KV_BYTES" in warning
    assert warnings_of(view(256, 300)) == []
    assert warnings_of(view(10, 10, version=3)) == []  # of another plan
    assert warnings_of(a_view(plan=None)) == []
    assert warnings_of(a_view(stages={0: state(0, "loading")})) == []
