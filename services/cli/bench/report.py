"""The report of `noodle bench`: figures from the times of tokens, conditions, remarks and table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from noodle.cluster.measuring import ControlReady
from noodle.cluster.reports import ReportHead
from noodle.model.formats import DTYPE_BY_FORMAT
from services.cli.client.reports import counted, print_table

BUSY_SHARE = 0.25  # of the cores busy with other work before the start; above it, a remark says so
FIGURES = ("first token (ms)", "between tokens p50 (ms)", "p99 (ms)", "prefill tokens/s", "tokens/s", "ratio")


@dataclass(frozen=True)
class RunTimes:
    """One run of concurrent streams: seconds from its start to each token of each stream."""

    prompt_tokens: int  # of each stream
    arrivals_seconds: tuple[tuple[float, ...], ...]  # [streams][new tokens]

    @property
    def seconds(self) -> float:
        return max(stream[-1] for stream in self.arrivals_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all streams over the whole run, prefill included."""
        return sum(len(stream) for stream in self.arrivals_seconds) / self.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all streams over the time until all have their first token."""
        return self.prompt_tokens * len(self.arrivals_seconds) / max(self.first_token_seconds)

    @property
    def first_token_seconds(self) -> list[float]:
        return [stream[0] for stream in self.arrivals_seconds]

    @property
    def between_tokens_seconds(self) -> list[float]:
        return [later - earlier for stream in self.arrivals_seconds for earlier, later in itertools.pairwise(stream)]


class Figures(Struct, frozen=True):
    """The figures of one side for one number of streams, over all its runs; medians unless named otherwise."""

    first_token_seconds: float  # over all streams of all runs
    between_tokens_seconds: float | None  # None if each stream had one token
    between_tokens_p99_seconds: float | None
    between_tokens_samples: int
    prefill_tokens_per_second: float
    tokens_per_second: float
    runs_tokens_per_second: tuple[float, ...]


class Ratio(Struct, frozen=True):
    """The cluster's tokens per second over the control's, in consecutive runs."""

    median: float
    least: float
    most: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the values lie, interpolated between two neighbours."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"the percentile {share} of {len(values)} values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def figures_of(runs: Sequence[RunTimes]) -> Figures:
    """Return the figures of one side's runs for one number of streams; at least one run."""
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
    """Return the ratio from pairs of consecutive runs: a machine's speed drifts, so only neighbours are compared."""
    ratios = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in zip(cluster, control, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


class StageConditions(Struct, frozen=True):
    """One stage of the cluster, as the coordinator sees it."""

    stage_id: int
    machine: str
    layers: int
    dtype: str
    device: str = ""  # empty if the stage does not report it; so are the two below
    device_name: str = ""
    threads: int = 0
    executor: str = ""  # empty in reports of earlier versions; so is the next one
    weights: str = ""

    @property
    def number_format(self) -> str:
        """The format of the weights: ggml's name where it is no dtype, such as `stored`; else the dtype."""
        if self.executor != "ggml":
            return self.dtype
        return DTYPE_BY_FORMAT.get(self.weights, self.weights)


class BenchConditions(Struct, frozen=True):
    """The conditions of the figures."""

    noodle_version: str
    coordinator_version: str
    url: str
    stages: tuple[StageConditions, ...]
    plan_version: int
    plan_reason: str
    context_length: int
    model_digest: str  # empty without a control, which needs the model's folder
    control_model: str  # the unsplit model's name on this machine; empty without a control
    prompt_tokens: int
    new_tokens: int
    pairs: int
    warm_up_tokens: int
    cores: int  # that this command may use
    load_average: float | None  # of the last minute before the start; None if the system has none
    control: ControlReady | None = None


class StreamsResult(Struct, frozen=True):
    """The result for one number of concurrent streams."""

    streams: int
    cluster: Figures
    control: Figures | None = None
    ratio: Ratio | None = None


class BenchReport(ReportHead, frozen=True, kw_only=True):
    """The whole report."""

    kind: Literal["bench"] = "bench"
    conditions: BenchConditions
    results: tuple[StreamsResult, ...]
    remarks: tuple[str, ...]


def was_busy(load_average: float | None, cores: int) -> bool:
    """Return whether the machine was too busy before the start for reliable figures."""
    return load_average is not None and load_average > BUSY_SHARE * cores


def headline(results: Sequence[StreamsResult]) -> str:
    """Return the report in one line, for a list."""
    parts = []
    for result in results:
        ratio = f" ({result.ratio.median:.2f} x)" if result.ratio else ""
        parts.append(f"{result.streams}: {result.cluster.tokens_per_second:.1f}{ratio}")
    return f"tokens/s by streams: {', '.join(parts)}"[:200]


def remarks(conditions: BenchConditions, streams: Sequence[int], machine: str, model: str) -> tuple[str, ...]:
    """Return what makes the comparison unequal or the figures unreliable, one sentence each."""
    stages, control = conditions.stages, conditions.control
    texts = _of_dtypes(stages, control) + _of_compute(stages, control, machine)
    threads_here = sum(stage.threads for stage in stages if stage.machine == machine)
    if threads_here > conditions.cores:
        texts.append(f"The stages of this machine have {threads_here} threads for its {conditions.cores} cores.")
    if control is not None:
        if conditions.control_model != model:
            texts.append(f"The cluster's model is {model}, the control's is {conditions.control_model}.")
        if max(streams) > 1:
            texts.append(
                "Several streams: the control computes them as one batch through generate(), all prompts of one length."
            )
        texts.append("The cluster is timed by an HTTP client on this machine, the control inside its own process.")
    if len(stages) > 1 and 1 in streams:
        texts.append("One stream: the stages compute one after another, each with only its own threads.")
    if was_busy(conditions.load_average, conditions.cores):
        texts.append(
            f"This machine was not idle before the start (a load of {conditions.load_average:.1f} on "
            f"{conditions.cores} cores): neither the figures nor the ratio are reliable."
        )
    return tuple(texts)


def _of_dtypes(stages: Sequence[StageConditions], control: ControlReady | None) -> list[str]:
    dtypes = sorted({stage.number_format for stage in stages})
    if len(dtypes) > 1:
        computes = f", the control in {control.dtype}" if control else ""
        return [f"Unequal number formats: the stages compute in {' and '.join(dtypes)}{computes}."]
    if control is not None and control.dtype not in dtypes:
        return [f"Unequal number formats: the cluster computes in {dtypes[0]}, the control in {control.dtype}."]
    return []


def _of_compute(stages: Sequence[StageConditions], control: ControlReady | None, machine: str) -> list[str]:
    if control is None:
        return ["There is no control, so the report does not show what the split costs or gains."]
    texts = []
    machines = sorted({stage.machine for stage in stages})
    if machines != [machine]:
        texts.append(f"Unequal machines: the cluster is {', '.join(machines)}; the control is {machine} alone.")
    threads = [stage.threads for stage in stages]
    if not all(threads):
        texts.append("Not every stage reports its number of threads.")
    elif sum(threads) != control.threads:
        texts.append(
            f"Unequal threads: the cluster's stages have {' + '.join(map(str, threads))}, "
            f"the control has {control.threads}."
        )
    devices = sorted({stage.device for stage in stages if stage.device})
    if devices and devices != [control.device]:
        texts.append(
            f"Unequal devices: the stages compute on {' and '.join(devices)}, the control on {control.device}."
        )
    return texts


def print_report(report: BenchReport) -> None:
    conditions = report.conditions
    print(
        f"{report.model} on {report.machine}, {report.made_at}: {conditions.prompt_tokens} prompt tokens and "
        f"{conditions.new_tokens} new tokens in each stream, greedy, past any end of text; medians of "
        f"{counted(conditions.pairs, 'run')} of each side."
    )
    for line in computing_lines(conditions):
        print(line)
    rows: list[tuple[str, ...]] = []
    for result in report.results:
        ratio = result.ratio
        shown = f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})" if ratio else ""
        rows.append((str(result.streams), "cluster", *_cells(result.cluster), shown))
        if result.control is not None:
            rows.append(("", "control", *_cells(result.control), ""))
    print_table(("streams", "", *FIGURES), rows, right=("streams", *FIGURES))
    if any(result.ratio for result in report.results):
        print("ratio: the cluster's tokens/s over the control's, median of pairs of runs (least to most).")
    for remark in report.remarks:
        print(f"- {remark}")


def computing_lines(conditions: BenchConditions) -> list[str]:
    """Return a line for each stage and the control: what it computes with."""
    lines = []
    for stage in conditions.stages:
        device = f"{stage.device} ({stage.device_name}), " if stage.device else ""
        threads = f", {counted(stage.threads, 'thread')}" if stage.threads else ""
        computes = f"{stage.executor} {stage.number_format}".strip()
        lines.append(f"stage {stage.stage_id}: {stage.machine}, {stage.layers} layers, {device}{computes}{threads}")
    if (control := conditions.control) is not None:
        lines.append(
            f"control: unsplit, transformers {control.transformers_version} generate(), {control.device} "
            f"({control.device_name}), {control.dtype}, {counted(control.threads, 'thread')} on "
            f"{counted(control.cores, 'core')}"
        )
    return lines


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        f"{figures.first_token_seconds * 1e3:.0f}",
        _milliseconds(figures.between_tokens_seconds),
        _milliseconds(figures.between_tokens_p99_seconds),
        f"{figures.prefill_tokens_per_second:.1f}",
        f"{figures.tokens_per_second:.2f}",
    )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"
