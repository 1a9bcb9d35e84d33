"""Chooses what computes a stage's layers: the fastest candidate whose quality is allowed, by measurement alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from noodle.errors import ConfigurationError, UnsupportedModel
from noodle.model.formats import Quality, why_refused
from services.stage.executors.candidate import Candidate
from services.stage.selection.benchmark import MeasuredSeconds

# What a candidate is held against another by: a request of as many prompt tokens as new ones. A prompt's tokens are
# computed together, so they weigh little where they are not slow.
PROMPT_TOKENS_PER_NEW_TOKEN = 1.0
FEWER_THREADS_SHARE = 0.95  # of the seconds of all threads: what fewer of them must not take


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a stage computes with, how fast that is, and in words why."""

    candidate: Candidate
    seconds: MeasuredSeconds
    quality: Quality | None  # None where the candidate is lossless, or its quality can not be measured
    reason: str


def choose(
    compared: Sequence[Candidate],
    wanted_quality: str,
    measure: Callable[[Candidate], MeasuredSeconds],
    quality_of: Callable[[Candidate, MeasuredSeconds], Quality],
) -> Chosen:
    """Time all, then try the quality of the fastest ones until one is allowed.

    `quality_of` gets what was timed too, and may raise UnsupportedModel when it can not be measured: a candidate that
    nobody asked for by name is not used then. Raises ConfigurationError when none is left, with what each one lacks.
    """
    timed = sorted(((measure(candidate), candidate) for candidate in compared), key=lambda each: cost(each[0]))
    times = ", ".join(f"{candidate} {_times(seconds)}" for seconds, candidate in timed)
    refused: list[str] = []
    for seconds, candidate in timed:
        quality, why = None, ""
        if not candidate.is_lossless:
            try:
                quality = quality_of(candidate, seconds)
                why = why_refused(quality, wanted_quality)
            except UnsupportedModel as error:
                why = "" if len(compared) == 1 else f"its quality is not known: {error.message}"
        if why:
            refused.append(f"{candidate} is refused ({why})")
            continue
        reason = "; ".join([f"{candidate}, of a new and a prompt token: {times}", *_told(quality), *refused])
        return Chosen(candidate, seconds, quality, reason)
    raise ConfigurationError(
        f"No allowed way to compute this model is left here: {'; '.join(refused)}.",
        cure="Allow more (NOODLE_QUALITY=small), or leave NOODLE_WEIGHTS and NOODLE_DTYPE at auto.",
    )


def choose_threads(
    chosen: Chosen, threads: int, measure: Callable[[Candidate, int], MeasuredSeconds]
) -> tuple[int, Chosen]:
    """Half as many threads where these are faster: of two that share a core one may only be in the other's way.

    Gives how many, and the choice with the seconds that they take.
    """
    half = threads // 2
    if half < 1:
        return threads, chosen
    seconds = measure(chosen.candidate, half)
    if cost(seconds) >= FEWER_THREADS_SHARE * cost(chosen.seconds):
        return threads, chosen
    reason = f"{chosen.reason}; {half} threads take {_times(seconds)}, {threads} more than that"
    return half, replace(chosen, seconds=seconds, reason=reason)


def cost(seconds: MeasuredSeconds) -> float:
    """Seconds of a layer for one new token and its share of the prompt."""
    return seconds.decode_layer_seconds + PROMPT_TOKENS_PER_NEW_TOKEN * seconds.prefill_layer_seconds_per_token


def _times(seconds: MeasuredSeconds) -> str:
    decode, prefill = seconds.decode_layer_seconds * 1e3, seconds.prefill_layer_seconds_per_token * 1e3
    return f"{decode:.2f} and {prefill:.3f} ms a layer"


def _told(quality: Quality | None) -> list[str]:
    if quality is None:
        return []
    return [f"perplexity times {quality.perplexity_ratio:.4f}, {quality.greedy_agreement:.1%} of greedy tokens agree"]
