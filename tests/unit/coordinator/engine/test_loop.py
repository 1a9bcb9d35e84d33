"""The coordinator's loop with a fake pipeline: the messages it sends, their order, and the fate of requests."""

import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import Plan, StageAssignment
from noodle.errors import GenerationFailed, LinkLost, RequestTimedOut, Unprocessable
from noodle.metrics.counted import CoordinatorMetrics
from noodle.wire.messages import (
    LiveSessions,
    SpanRefusal,
    SpanResult,
    StageTiming,
    Step,
    StepResult,
)
from services.coordinator.engine import loop
from services.coordinator.engine import scheduler as scheduler_module
from services.coordinator.engine.admission import Activate
from services.coordinator.engine.loop import EngineLoop
from services.coordinator.engine.pipeline import PipelineDown, PipelineUp
from services.coordinator.engine.request import LOOPBACK, Token
from services.coordinator.engine.scheduler import Scheduler
from tests.support.processes.cluster import wait_until
from tests.support.sequences import a_request, plan_limits

STAGES = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{8081 + i}", 3 * i, 3 * i + 3, "float32") for i in range(2))
PLAN = Plan(1, "digest", 6, 64, 300, 256, STAGES)
RECOVERY_SECONDS = 1.0
WAIT_SECONDS = 10.0
LOST = "stage 1 on vm is lost (killed)"


class SilentRecorder:
    def begin(self, record):
        pass

    def resume(self, record, tokens):
        pass

    def token(self, request_id, token):
        pass

    def end(self, request_id, outcome):
        pass

    def hand_over(self, request_id):
        pass


class StandInPipeline:
    """Keeps the messages it is given; the test answers."""

    def __init__(self):
        self.sent = []
        self.is_cut = False

    def send(self, message, body=b""):
        if self.is_cut:
            raise LinkLost("cut")
        self.sent.append(message)

    def close(self):
        pass

    @property
    def steps(self):
        return [message for message in self.sent if isinstance(message, Step)]


class Rig:
    """A running loop; the test plays its two stages."""

    def __init__(self, kv_tokens=1000):
        self.pipeline = StandInPipeline()
        self.registry = CollectorRegistry()
        self.loop = EngineLoop(
            Scheduler(step_tokens=64, maximum_running=8),
            SilentRecorder(),
            CoordinatorMetrics(self.registry),
            lambda plan, epoch, tell: self.pipeline,
            maximum_open=16,
            recovery_seconds=RECOVERY_SECONDS,
        )
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()
        self.tell(Activate(PLAN, plan_limits(2, kv_tokens, 256), 1))
        self.up()

    def tell(self, event):
        self.loop.notify(event)

    def up(self, *boot_ids):
        self.tell(PipelineUp(1, boot_ids or ("boot 0", "boot 1")))
        wait_until(lambda: self.loop.state.up, WAIT_SECONDS, "the loop knows that the pipeline stands")

    def down(self):
        self.tell(PipelineDown(1, LOST))
        wait_until(lambda: not self.loop.state.up, WAIT_SECONDS, "the loop knows that the pipeline is broken")

    def submit(self, prompt=5, new=4, **options):
        return self.stream(prompt, new, **options).open_reader()

    def stream(self, prompt=5, new=4, **options):
        asked = a_request("", range(3, 3 + prompt), new, **options)
        return self.loop.admission.submit(asked, LOOPBACK, frozenset())

    def step(self, number):
        """Wait for a step by its number, counted from 1."""
        wait_until(lambda: len(self.pipeline.steps) >= number, WAIT_SECONDS, f"step {number}")
        return self.pipeline.steps[number - 1]

    def answer(self, step, token_id=7, timings=()):
        spans = [
            SpanResult(s.session_id, s.session_epoch, s.first_position, s.token_count, token_id if s.sampling else None)
            for s in step.spans
        ]
        self.tell(StepResult(step.step_id, 1, 1, spans, [], timings=list(timings)))

    def refuse(self, step, reason):
        refusals = [
            SpanRefusal(s.session_id, s.session_epoch, s.first_position, 1, reason, message="because")
            for s in step.spans
        ]
        self.tell(StepResult(step.step_id, 1, 1, [], refusals, timings=[]))


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.loop.stop()
    made.thread.join(WAIT_SECONDS)


def ended_with(stream, seconds=WAIT_SECONDS):
    """Wait for the error that ends a request."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            stream.next(0.05)
        except GenerationFailed as error:
            return error
    raise AssertionError("the request did not end")


def live_lists(rig):
    return [message for message in rig.pipeline.sent if isinstance(message, LiveSessions)]


def test_after_a_break_the_stages_get_the_live_sessions_before_any_step(rig):
    gone, stays = rig.submit(), rig.submit()
    rig.step(1)
    rig.down()
    before = len(rig.pipeline.sent)
    gone.cancel()
    wait_until(lambda: len(rig.loop._open.all()) == 1, WAIT_SECONDS, "one request is left")
    assert len(rig.pipeline.sent) == before
    rig.up()
    wait_until(lambda: len(rig.pipeline.sent) > before + 1, WAIT_SECONDS, "something is sent again")
    first, second = rig.pipeline.sent[before : before + 2]
    assert isinstance(first, LiveSessions)
    assert first.is_authoritative
    assert first.sessions == [stays.request_id]
    assert isinstance(second, Step)


def test_after_a_restart_of_a_stage_all_get_the_live_sessions_before_the_replay(rig):
    gone, stays = rig.submit(), rig.submit()
    rig.step(1)
    rig.down()
    before = len(rig.pipeline.sent)
    gone.cancel()
    rig.up("boot 0", "another boot 1")
    wait_until(lambda: len(rig.pipeline.sent) > before + 1, WAIT_SECONDS, "something is sent again")
    first, second = rig.pipeline.sent[before : before + 2]
    assert (first.sessions, first.is_authoritative) == ([stays.request_id], True)
    assert [(span.session_epoch, span.first_position) for span in second.spans] == [(2, 0)]


@pytest.mark.parametrize("is_long", [False, True])
def test_after_a_long_break_kept_rows_that_stages_may_have_freed_are_forgotten(rig, monkeypatch, is_long):
    monkeypatch.setattr(loop, "KEPT_OVER_BREAK_SECONDS", 0.0 if is_long else 60.0)
    ended = rig.submit(new=1)
    rig.answer(rig.step(1))
    wait_until(lambda: rig.loop.kept_rows, WAIT_SECONDS, "its rows are kept")
    rig.down()
    before = len(live_lists(rig))
    rig.up()
    wait_until(lambda: len(live_lists(rig)) > before, WAIT_SECONDS, "the stages hear what is held")
    told = live_lists(rig)[before]
    assert told.is_authoritative
    assert told.sessions == ([] if is_long else [ended.request_id])
    assert bool(rig.loop.kept_rows) is not is_long


def test_new_limits_of_the_active_plan_count_at_once_and_nothing_is_prefilled_again(rig):
    request = rig.submit()
    rig.step(1)
    rig.tell(Activate(PLAN, plan_limits(2, 100, 256), 1))
    wait_until(lambda: rig.loop.admission._limits().kv_tokens == 100, WAIT_SECONDS, "the loop has the new limits")
    with pytest.raises(Unprocessable, match="room for 100"):
        rig.submit(prompt=90, new=20)
    rig.answer(rig.step(1))
    assert wait_until(lambda: request.next(0.05), WAIT_SECONDS, "a token").token_id == 7
    assert rig.step(2).spans[0].session_epoch == 1


def test_regular_lists_of_live_sessions_free_nothing_at_once(rig):
    rig.submit()
    rig.step(1)
    before = len(live_lists(rig))
    wait_until(lambda: len(live_lists(rig)) > before + 1, WAIT_SECONDS, "two more lists")
    assert not any(live.is_authoritative for live in live_lists(rig)[before:])


def test_a_stage_without_room_gets_the_authoritative_list_and_the_request_continues(rig, monkeypatch):
    monkeypatch.setattr(scheduler_module, "ROOM_RETRY_SECONDS", 0.1)
    request = rig.submit(new=1)
    rig.refuse(rig.step(1), "kv_budget")
    again = rig.step(2)
    assert again.spans[0].session_epoch == 2
    sent = rig.pipeline.sent
    between = sent[sent.index(rig.pipeline.steps[0]) + 1 : sent.index(again)]
    assert any(live.is_authoritative and live.sessions == [] for live in between)
    rig.answer(again)
    token = wait_until(lambda: request.next(0.05), WAIT_SECONDS, "a token")
    assert (token.token_id, token.finish_reason) == (7, "length")


def test_a_stage_that_never_has_room_ends_the_request_with_its_message(rig, monkeypatch):
    monkeypatch.setattr(scheduler_module, "ROOM_RETRY_SECONDS", 0.01)
    request = rig.submit()
    for number in range(1, scheduler_module.MAXIMUM_REPLAYS + 2):
        rig.refuse(rig.step(number), "kv_budget")
    assert "Stage 1 refused a step of this request: because (kv_budget)" in str(ended_with(request))


def test_a_request_whose_pipeline_does_not_return_ends_in_time_with_the_stage_named(rig):
    request = rig.submit()
    rig.answer(rig.step(1))
    assert wait_until(lambda: request.next(0.05), WAIT_SECONDS, "a token").token_id == 7
    started = time.monotonic()
    rig.down()
    error = ended_with(request)
    assert RECOVERY_SECONDS - 0.5 < time.monotonic() - started < 3 * RECOVERY_SECONDS
    assert LOST in str(error)
    assert "noodle status" in str(error)


def test_a_request_continues_if_the_stage_returns_in_time(rig):
    request = rig.submit(new=2)
    rig.answer(rig.step(1))
    rig.step(2)
    rig.down()
    rig.up("boot 0", "another boot 1")
    replay = rig.step(3)
    assert [(span.session_epoch, span.first_position, span.token_count) for span in replay.spans] == [(2, 0, 6)]
    rig.answer(replay, 8)
    tokens = [wait_until(lambda: request.next(0.05), WAIT_SECONDS, "a token") for _ in range(2)]
    assert [(token.token_id, token.finish_reason) for token in tokens] == [(7, ""), (8, "length")]


def test_a_pipeline_that_comes_and_goes_does_not_hold_a_request_for_ever(rig):
    request = rig.submit()
    rig.step(1)
    over = threading.Event()

    def flap():
        while not over.is_set():
            rig.down()
            over.wait(0.1)
            rig.up("boot 0", str(time.monotonic()))
            over.wait(0.2)

    thread = threading.Thread(target=flap)
    started = time.monotonic()
    thread.start()
    try:
        ended_with(request)
        assert time.monotonic() - started < 3 * RECOVERY_SECONDS
    finally:
        over.set()
        thread.join(WAIT_SECONDS)


def test_a_step_that_is_lost_after_the_break_is_not_retried_when_the_time_is_over(rig, monkeypatch):
    monkeypatch.setattr(scheduler_module, "DEADLINE_FLOOR_SECONDS", RECOVERY_SECONDS)
    request = rig.submit()
    rig.step(1)
    rig.down()
    rig.up("boot 0", "another boot 1")
    assert LOST in str(ended_with(request))
    assert len(rig.pipeline.steps) == 2


def test_a_waiting_request_has_its_full_time_again_as_soon_as_something_is_computed_for_others(rig):
    rig.submit(new=600), rig.submit(new=600)  # the second waits for the rows of the first
    rig.answer(rig.step(1))
    rig.step(2)
    rig.down()
    assert not rig.loop._recovery.is_whole
    rig.up()
    rig.answer(rig.step(3))
    wait_until(lambda: rig.loop._recovery.is_whole, WAIT_SECONDS, "nothing is left of the break")


def test_a_pipeline_that_is_up_again_gets_the_steps_in_flight_again(rig):
    rig.submit()
    step = rig.step(1)
    rig.up()
    assert rig.step(2) == step


def test_a_request_past_its_deadline_ends_with_its_tokens_so_far(rig):
    request = rig.submit(timeout_seconds=0.5)
    rig.answer(rig.step(1))
    assert wait_until(lambda: request.next(0.05), WAIT_SECONDS, "a token").token_id == 7
    with pytest.raises(RequestTimedOut) as late:
        wait_until(lambda: request.next(0.05), WAIT_SECONDS, "no second token comes")
    error = late.value
    assert "has 1 tokens" in str(error)


def test_a_request_whose_client_may_come_back_runs_without_it_for_resume_seconds(rig):
    stream = rig.stream(resume_seconds=0.6)
    stream.open_reader().cancel()
    rig.answer(rig.step(1))
    again = stream.open_reader()
    assert wait_until(lambda: again.next(0.05), WAIT_SECONDS, "the token that came meanwhile").token_id == 7
    again.cancel()
    wait_until(lambda: stream.ended_at is not None, WAIT_SECONDS, "nobody came back")
    assert "did not come back" in str(stream.failure)


def test_two_readers_get_the_same_and_the_request_ends_with_the_last_one(rig):
    stream = rig.stream()
    first, second = stream.open_reader(), stream.open_reader()
    rig.answer(rig.step(1))
    for reader in (first, second):
        assert wait_until(lambda reader=reader: reader.next(0.05), WAIT_SECONDS, "a token").token_id == 7
    first.cancel()
    first.cancel()
    rig.answer(rig.step(2), 8)
    assert wait_until(lambda: second.next(0.05), WAIT_SECONDS, "a token").token_id == 8
    second.cancel()
    wait_until(lambda: stream.ended_at is not None, WAIT_SECONDS, "it is cancelled")


def test_a_request_of_an_earlier_coordinator_continues_after_its_last_recorded_token(rig):
    record = a_request("r", [3, 4, 5], 4, ignore_eos=True)
    stream = rig.loop.admission.resume(record, [Token(7), Token(8)], frozenset(), 30.0)
    assert rig.loop.admission.resume(record, [], frozenset(), 30.0) is None
    step = rig.step(1)
    assert [(span.first_position, span.token_count) for span in step.spans] == [(0, 5)]
    rig.answer(step, 9)
    rig.answer(rig.step(2), 10)
    reader = stream.open_reader()
    tokens = [wait_until(lambda: reader.next(0.05), WAIT_SECONDS, "a token") for _ in range(4)]
    assert [token.token_id for token in tokens] == [7, 8, 9, 10]
    assert tokens[-1].finish_reason == "length"


def test_a_recorded_request_that_lacks_only_its_end_ends(rig):
    record = a_request("r", [3, 4, 5], 1, ignore_eos=True)
    stream = rig.loop.admission.resume(record, [Token(7, finish_reason="length")], frozenset(), 30.0)
    wait_until(lambda: stream.ended_at is not None, WAIT_SECONDS, "it has ended")
    assert stream.failure is None


def test_the_parts_of_a_requests_time_between_tokens_add_up_to_it(rig):
    timings = [StageTiming(0, 0.0, 1e-6, 1e-7), StageTiming(1, 2e-7, 2e-6, 0.0)]
    request = rig.submit(new=4)
    for number in range(1, 5):
        rig.answer(rig.step(number), token_id=number, timings=timings)
    wait_until(lambda: rig.loop._open.get(request.request_id) is None, WAIT_SECONDS, "the request has ended")

    def value(name, **labels):
        return rig.registry.get_sample_value(name, labels)

    # the result that ended the request is counted after its end
    wait_until(lambda: value("noodle_step_seconds_count", kind="decode") == 3, WAIT_SECONDS, "three decode steps")
    assert value("noodle_step_seconds_count", kind="prefill") == 1
    whole = value("noodle_inter_token_latency_seconds_sum")
    parts = [
        value("noodle_token_stage_seconds_total", part=part, stage=stage, machine="vm")
        for part in ("compute", "wait", "send")
        for stage in ("0", "1")
    ]
    assert parts == pytest.approx([3e-6, 6e-6, 0.0, 6e-7, 3e-7, 0.0])
    assert value("noodle_token_hop_seconds_total") == pytest.approx(whole - sum(parts))
    assert value("noodle_e2e_request_latency_seconds_count") == 1
