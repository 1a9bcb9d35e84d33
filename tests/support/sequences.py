"""Requests, sequences, schedulers and results of steps, as tests of the coordinator's engine make them."""

from noodle.wire.messages import SpanRefusal, SpanResult, StepResult
from services.coordinator.engine.request import Request
from services.coordinator.engine.scheduler import Scheduler
from services.coordinator.engine.sequence import PlanLimits, Sequence


def a_request(name="a", prompt=(3, 4, 5), new=4, **options):
    return Request(request_id=name, prompt_token_ids=list(prompt), max_new_tokens=new, **options)


def a_sequence(name="a", prompt=(3, 4, 5), new=4, end=(), **options):
    return Sequence(a_request(name, prompt, new, **options), frozenset(end))


def plan_limits(stage_count=2, kv_tokens=1000, context_length=1000, reserved_kv_tokens=None, decode_seconds=0.01):
    return PlanLimits(
        plan_version=1,
        stage_count=stage_count,
        kv_tokens=kv_tokens,
        context_length=context_length,
        decode_seconds=decode_seconds,
        prefill_seconds_per_token=decode_seconds / 10,
        reserved_kv_tokens=reserved_kv_tokens,
    )


def a_scheduler(stages=2, step_tokens=8, kv_tokens=10_000, maximum_running=16):
    scheduler = Scheduler(step_tokens, maximum_running)
    scheduler.limits = plan_limits(stages, kv_tokens)
    scheduler.coordinator_epoch = 1
    return scheduler


def answer(flight, token_id=7, only=None):
    """The result of a step in which every sampled token is `token_id`."""
    spans = [
        SpanResult(
            session_id=s.session_id,
            session_epoch=s.session_epoch,
            first_position=s.first_position,
            token_count=s.token_count,
            token_id=token_id if s.sampling else None,
        )
        for s in flight.step.spans
        if only is None or s.session_id in only
    ]
    return a_result(flight, spans)


def a_result(flight, spans=(), refusals=()):
    return StepResult(
        step_id=flight.step.step_id,
        plan_version=1,
        coordinator_epoch=flight.step.coordinator_epoch,
        spans=list(spans),
        refusals=list(refusals),
        timings=[],
    )


def refusal(flight, reason):
    """The result of a step whose first span a stage refused."""
    s = flight.step.spans[0]
    refused = SpanRefusal(s.session_id, s.session_epoch, s.first_position, 0, reason, message="because")
    return a_result(flight, refusals=[refused])
