"""Predicts from measured layer seconds how fast a plan will be; knows numbers only, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from noodle.cluster.plan import MachineReport, Plan, Source, StageAssignment

PROMPT_TOKENS_PER_NEW_ONE = 4.0  # of a usual request: chats carry what was said before, and some of it is kept


@dataclass(frozen=True, slots=True)
class HopCost:
    """What one hop costs a decode step, one way."""

    seconds: float
    source: Source


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan should do; compared with what happens."""

    stage_seconds: tuple[float, ...]  # of one decode token, in pipeline order
    token_seconds: float  # one token of a single session: every stage and every hop, one after the other
    steady_token_seconds: float  # between two tokens when every stage has work: the slowest stage
    prefill_tokens_per_second: float  # of a long prompt in chunks, all stages at work: the slowest stage
    source: Source  # of the weakest number in it


def stage_decode_seconds(machine: MachineReport, layer_count: int, *, is_last: bool, is_batched: bool = False) -> float:
    """Seconds one stage computes on one token, alone in its step or its share of one that some sessions share."""
    layer, head = machine.decode_layer_seconds, machine.head_decode_seconds
    if is_batched:
        layer, head = machine.batched_layer_seconds, machine.batched_head_seconds
    return layer_count * layer + (head if is_last else 0.0)


def stage_work_seconds(machine: MachineReport, layer_count: int, *, is_last: bool, is_batched: bool) -> float:
    """What one new token costs a stage with its share of a prompt: what layers are dealt out by.

    By decode alone the last stage would get few layers for its head's sake, which no token of a prompt needs. How they
    are dealt out matters when all stages have work, and then sessions share a step: `is_batched` takes a token of such.
    """
    decode_seconds = stage_decode_seconds(machine, layer_count, is_last=is_last, is_batched=is_batched)
    return decode_seconds + PROMPT_TOKENS_PER_NEW_ONE * layer_count * machine.prefill_layer_seconds_per_token


def predict(stages: Sequence[StageAssignment], machines: Mapping[int, MachineReport], hop: HopCost) -> Prediction:
    """The prediction for `stages` in pipeline order; `machines` by stage id.

    A token makes one hop more than there are stages: into the first one, between them, and back to the coordinator.
    """
    layer_counts = [stage.end_layer - stage.start_layer for stage in stages]
    reports = [machines[stage.stage_id] for stage in stages]
    last = len(stages) - 1
    stage_seconds = tuple(
        stage_decode_seconds(report, count, is_last=index == last)
        for index, (report, count) in enumerate(zip(reports, layer_counts, strict=True))
    )
    slowest_prefill = max(
        report.prefill_layer_seconds_per_token * count for report, count in zip(reports, layer_counts, strict=True)
    )
    return Prediction(
        stage_seconds=stage_seconds,
        token_seconds=sum(stage_seconds) + hop.seconds * (len(stages) + 1) + _bytes_seconds(stages),
        steady_token_seconds=max(*stage_seconds, *(stage.hop_token_seconds for stage in stages)),
        prefill_tokens_per_second=1 / max(slowest_prefill, *(stage.hop_token_seconds for stage in stages)),
        source=_weakest([hop.source, *(report.source for report in reports)]),
    )


def planned_token_seconds(plan: Plan, hop: HopCost) -> float:
    """`Prediction.token_seconds` of a plan that stands, by what it says of its stages itself: some may be silent."""
    computing = sum(stage.decode_seconds for stage in plan.stages)
    return computing + hop.seconds * (len(plan.stages) + 1) + _bytes_seconds(plan.stages)


def _bytes_seconds(stages: Sequence[StageAssignment]) -> float:
    """What one token's hidden states take on all links beside the way there."""
    return sum(stage.hop_token_seconds for stage in stages)


def in_words(prediction: Prediction) -> str:
    """The prediction as one clause for Plan.reason."""
    return (
        f"{1 / prediction.token_seconds:.1f} tokens/s for one session and "
        f"{prediction.prefill_tokens_per_second:.0f} of prompt predicted from {prediction.source} numbers, "
        f"the slowest of {len(prediction.stage_seconds)} stages takes "
        f"{prediction.steady_token_seconds * 1000:.1f} ms a token"
    )


def _weakest(sources: Sequence[Source]) -> Source:
    order: tuple[Source, ...] = ("assumed", "configured", "measured")
    return next(source for source in order if source in sources)
