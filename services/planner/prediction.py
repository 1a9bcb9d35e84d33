"""Predict from measured layer seconds how fast a plan will be; a prediction names the source of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from noodle.cluster.plan import FormatSeconds, MachineReport, Plan, Source, StageAssignment

WORTH_CHANGING = 1.1  # times as fast, from which on another format is worth a line
PROMPT_TOKENS_PER_NEW_TOKEN = 4.0  # in a usual request: a chat repeats its history, and some of that is cached


@dataclass(frozen=True, slots=True)
class HopCost:
    """What one hop costs a decode step, one way."""

    seconds: float
    source: Source


ASSUMED_HOP = HopCost(0.001, "assumed")  # until links are measured


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan should achieve."""

    stage_seconds: tuple[float, ...]  # for one decode token, in pipeline order
    token_seconds: float  # one token of a single session: every stage and every hop, one after the other
    steady_token_seconds: float  # between two tokens while every stage has work: the slowest stage
    prefill_tokens_per_second: float  # for a long prompt in chunks, all stages working: the slowest stage
    source: Source  # of its weakest number


def stage_decode_seconds(machine: MachineReport, layer_count: int, *, is_last: bool, is_batched: bool = False) -> float:
    """Seconds one stage computes on one token, alone in its step or (`is_batched`) in a step that sessions share."""
    layer, head = machine.decode_layer_seconds, machine.head_decode_seconds
    if is_batched:
        layer, head = machine.batched_layer_seconds, machine.batched_head_seconds
    return layer_count * layer + (head if is_last else 0.0)


def stage_work_seconds(machine: MachineReport, layer_count: int, *, is_last: bool, is_batched: bool) -> float:
    """Seconds a stage spends on one new token and its share of a prompt; layers are divided by this cost.

    By decode alone, the last stage would get few layers because of its head, which prompt tokens do not need. The
    division matters when all stages have work; sessions then share steps, which `is_batched` accounts for.
    """
    decode_seconds = stage_decode_seconds(machine, layer_count, is_last=is_last, is_batched=is_batched)
    return decode_seconds + PROMPT_TOKENS_PER_NEW_TOKEN * layer_count * machine.prefill_layer_seconds_per_token


def predict(
    stages: Sequence[StageAssignment], machines: Mapping[int, MachineReport], hop: HopCost = ASSUMED_HOP
) -> Prediction:
    """Predict for `stages` in pipeline order; `machines` by stage id.

    A token makes one hop more than there are stages: to the first one, between them, and back to the coordinator.
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


@dataclass(frozen=True, slots=True)
class Gain:
    """What another format of weights would gain on all stages: times as fast, for new tokens and for prompts."""

    weights: str  # a value of NOODLE_WEIGHTS
    decode_ratio: float
    prefill_ratio: float


def faster_format(
    stages: Sequence[StageAssignment], machines: Mapping[int, MachineReport], memory_left_bytes: Mapping[int, float]
) -> Gain | None:
    """The format that would make this cut clearly faster, if there is one that every stage predicts and has room for.

    `memory_left_bytes` by stage id. Of two formats the more precise one, unless the other is clearly faster still.
    """
    last = stages[-1].stage_id
    reports = [(machines[stage.stage_id], stage.end_layer - stage.start_layer) for stage in stages]
    names = [name for name in reports[0][0].other_formats if all(name in each.other_formats for each, _ in reports)]

    def seconds(formats: Sequence[MachineReport | FormatSeconds]) -> tuple[float, float]:
        decode = prefill = 0.0
        for each, (report, count) in zip(formats, reports, strict=True):
            decode += count * each.decode_layer_seconds + (each.head_decode_seconds if report.stage_id == last else 0.0)
            prefill += count * each.prefill_layer_seconds_per_token
        return decode, prefill

    now = seconds([report for report, _ in reports])
    found: Gain | None = None
    best = now[0] + PROMPT_TOKENS_PER_NEW_TOKEN * now[1]
    for name in names:
        others = [report.other_formats[name] for report, _ in reports]
        fits = all(
            count * (other.layer_weight_bytes - report.layer_weight_bytes) <= memory_left_bytes[report.stage_id]
            for other, (report, count) in zip(others, reports, strict=True)
        )
        decode, prefill = seconds(others)
        work = decode + PROMPT_TOKENS_PER_NEW_TOKEN * prefill
        if fits and best > WORTH_CHANGING * work:
            found, best = Gain(name, now[0] / decode, now[1] / prefill), work
    return found


def planned_token_seconds(plan: Plan, hop: HopCost = ASSUMED_HOP) -> float:
    """`Prediction.token_seconds` from the plan alone, because stages may be silent."""
    computing = sum(stage.decode_seconds for stage in plan.stages)
    return computing + hop.seconds * (len(plan.stages) + 1) + _bytes_seconds(plan.stages)


def _bytes_seconds(stages: Sequence[StageAssignment]) -> float:
    """Transfer time of one token's hidden states on all links, without latency."""
    return sum(stage.hop_token_seconds for stage in stages)


def describe(prediction: Prediction) -> str:
    """The prediction as a clause for Plan.reason."""
    return (
        f"{1 / prediction.token_seconds:.1f} tokens/s for one session and "
        f"{prediction.prefill_tokens_per_second:.0f} of prompt predicted from {prediction.source} numbers, "
        f"the slowest of {len(prediction.stage_seconds)} stages takes "
        f"{prediction.steady_token_seconds * 1000:.1f} ms a token"
    )


def _weakest(sources: Sequence[Source]) -> Source:
    order: tuple[Source, ...] = ("assumed", "configured", "measured")
    return next(source for source in order if source in sources)
