"""The figures of `noodle bench` from the times at which tokens came; values in, values out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct


@dataclass(frozen=True)
class RunTimes:
    """One run of some streams at once: seconds from its start until each token of each stream was there."""

    prompt_tokens: int  # of each stream
    arrivals_seconds: tuple[tuple[float, ...], ...]  # [streams][new tokens]

    @property
    def seconds(self) -> float:
        """Until the last token of all."""
        return max(stream[-1] for stream in self.arrivals_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all streams over the whole run, prompts included."""
        return sum(len(stream) for stream in self.arrivals_seconds) / self.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all streams over the time until each had its first token."""
        last_first_seconds = max(stream[0] for stream in self.arrivals_seconds)
        return self.prompt_tokens * len(self.arrivals_seconds) / last_first_seconds

    @property
    def first_token_seconds(self) -> list[float]:
        """Of each stream."""
        return [stream[0] for stream in self.arrivals_seconds]

    @property
    def between_tokens_seconds(self) -> list[float]:
        """Every wait of a stream for its next token."""
        return [later - earlier for stream in self.arrivals_seconds for earlier, later in itertools.pairwise(stream)]


class Figures(Struct, frozen=True):
    """What one side did at one number of streams, over all its runs; medians unless a name says otherwise."""

    first_token_seconds: float  # of all streams of all runs
    between_tokens_seconds: float | None  # None where each stream had one token
    between_tokens_p99_seconds: float | None
    between_tokens_samples: int
    prefill_tokens_per_second: float
    tokens_per_second: float
    runs_tokens_per_second: tuple[float, ...]


class Ratio(Struct, frozen=True):
    """Tokens per second of the cluster over those of the control, in runs that followed one another."""

    median: float
    least: float
    most: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between two neighbours; of one value itself."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"the percentile {share} of {len(values)} values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def figures_of(runs: Sequence[RunTimes]) -> Figures:
    """Over all runs of one side at one number of streams; at least one."""
    waits = [seconds for run in runs for seconds in run.between_tokens_seconds]
    rates = tuple(run.tokens_per_second for run in runs)
    return Figures(
        first_token_seconds=statistics.median(seconds for run in runs for seconds in run.first_token_seconds),
        between_tokens_seconds=percentile(waits, 0.5) if waits else None,
        between_tokens_p99_seconds=percentile(waits, 0.99) if waits else None,
        between_tokens_samples=len(waits),
        prefill_tokens_per_second=statistics.median(run.prefill_tokens_per_second for run in runs),
        tokens_per_second=statistics.median(rates),
        runs_tokens_per_second=rates,
    )


def ratio_of(cluster: Sequence[RunTimes], control: Sequence[RunTimes]) -> Ratio:
    """From pairs of runs in their order: a machine drifts, so only neighbours are compared."""
    ratios = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in zip(cluster, control, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
