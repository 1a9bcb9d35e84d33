from services.coordinator.engine.recovery import Recovery

LIMIT = 10.0


def a_broken_one(at=100.0, is_busy=False, **arrived_at):
    recovery = Recovery(LIMIT)
    recovery.broke("stage 1 on b is lost", at, arrived_at or {"a": 0.0}, is_busy=is_busy)
    return recovery


def test_a_request_ends_after_the_recovery_time():
    recovery = a_broken_one()
    assert recovery.out_of_time(109.9) == {}
    error = recovery.out_of_time(110.0)["a"]
    assert "stage 1 on b is lost" in str(error)
    assert "10 seconds" in str(error)
    assert "NOODLE_RECOVERY_SECONDS" in error.cure


def test_a_computed_step_gives_only_its_requests_their_full_time_again():
    recovery = a_broken_one(a=0.0, b=0.0)
    recovery.computed(105.0, ["a"])
    assert not recovery.is_whole
    assert set(recovery.out_of_time(111.0)) == {"b"}
    recovery.broke("again", 112.0, {"a": 0.0, "b": 0.0}, is_busy=False)
    assert set(recovery.out_of_time(112.0)) == {"b"}
    assert set(recovery.out_of_time(122.0)) == {"a", "b"}


def test_a_pipeline_that_comes_and_goes_does_not_restart_the_time():
    recovery = a_broken_one()
    for second in range(101, 110):
        recovery.broke("stage 1 on b is lost", float(second), {"a": 0.0}, is_busy=True)
    assert set(recovery.out_of_time(110.0)) == {"a"}


def test_the_silence_by_which_a_frozen_stage_is_noticed_counts():
    recovery = Recovery(LIMIT)
    recovery.computed(100.0, ["a"])
    recovery.broke("silent", 103.0, {"a": 0.0}, is_busy=True)
    assert recovery.out_of_time(109.9) == {}
    assert set(recovery.out_of_time(110.0)) == {"a"}


def test_a_long_step_before_the_break_costs_a_request_no_more_than_that_silence():
    recovery = Recovery(LIMIT)
    recovery.computed(50.0, ["a"])
    recovery.broke("killed", 100.0, {"a": 0.0}, is_busy=True)
    assert recovery.out_of_time(106.9) == {}
    assert set(recovery.out_of_time(107.0)) == {"a"}


def test_a_request_that_came_after_the_break_has_its_full_time():
    recovery = Recovery(LIMIT)
    recovery.computed(90.0)
    recovery.broke("silent", 100.0, {"a": 0.0, "late": 99.5}, is_busy=True)
    assert set(recovery.out_of_time(107.0)) == {"a"}
    assert set(recovery.out_of_time(109.5)) == {"a", "late"}


def test_a_request_that_ended_is_forgotten():
    recovery = a_broken_one()
    recovery.forget("a")
    recovery.forget("never there")
    assert recovery.is_whole
    assert recovery.out_of_time(1000.0) == {}
