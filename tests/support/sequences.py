"""Requests and sequences as tests of the coordinator's engine make them."""

from services.coordinator.engine.request import Request
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
