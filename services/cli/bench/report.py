"""A report of `noodle bench`: its conditions, its figures, and what a reader must be told about them; values only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from noodle.cluster.measuring import ControlReady
from noodle.cluster.reports import ReportHead
from services.cli.bench.statistics import Figures, Ratio

BUSY_SHARE = 0.25  # of the cores computing for others before the start, from which on a reader is told


class StageConditions(Struct, frozen=True):
    """One stage of the cluster, as the coordinator sees it."""

    stage_id: int
    machine: str
    layers: int
    dtype: str
    device: str = ""  # empty where a stage does not say, as the two below
    device_name: str = ""
    threads: int = 0


class BenchConditions(Struct, frozen=True):
    """Everything that the figures hold for."""

    noodle_version: str
    coordinator_version: str
    url: str
    stages: tuple[StageConditions, ...]
    plan_version: int
    plan_reason: str
    context_length: int
    model_digest: str  # empty without a control: the model's folder is not looked for then
    control_model: str  # what this machine calls the unsplit model; empty without a control
    prompt_tokens: int
    new_tokens: int
    pairs: int
    warm_up_tokens: int
    cores: int  # that this command may use
    load_average: float | None  # of the last minute, before the start; None where the system has none
    control: ControlReady | None = None


class StreamsResult(Struct, frozen=True):
    """What came out for one number of streams at once."""

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
    """Whether so much was computed for others before the start that figures are not to be trusted."""
    return load_average is not None and load_average > BUSY_SHARE * cores


def headline(results: Sequence[StreamsResult]) -> str:
    """The report in a line of a list."""
    parts = []
    for result in results:
        ratio = f" ({result.ratio.median:.2f} x)" if result.ratio else ""
        parts.append(f"{result.streams}: {result.cluster.tokens_per_second:.1f}{ratio}")
    return f"tokens/s by streams: {', '.join(parts)}"[:200]


def remarks(conditions: BenchConditions, streams: Sequence[int], machine: str, model: str) -> tuple[str, ...]:
    """What makes the comparison uneven or the figures doubtful, in sentences; those that hold."""
    stages, control = conditions.stages, conditions.control
    here = [stage for stage in stages if stage.machine == machine]
    said = _of_dtypes(stages, control) + _of_compute(stages, control, machine)
    threads_here = sum(stage.threads for stage in here)
    if threads_here > conditions.cores:
        said.append(f"The stages of this machine have {threads_here} threads for its {conditions.cores} cores.")
    if control is not None:
        if conditions.control_model != model:
            said.append(f"The cluster calls its model {model}, the control's is {conditions.control_model}.")
        if max(streams) > 1:
            said.append(
                "Several streams: the control computes them as one batch through generate(), all prompts of one length."
            )
        said.append("The cluster is timed by an HTTP client on this machine, the control inside its own process.")
    if len(stages) > 1 and 1 in streams:
        said.append("One stream: its stages compute one after another, each with its own threads alone.")
    if was_busy(conditions.load_average, conditions.cores):
        said.append(
            f"This machine was not idle before the start (a load of {conditions.load_average:.1f} on "
            f"{conditions.cores} cores): neither the figures nor the ratio are to be trusted."
        )
    return tuple(said)


def _of_dtypes(stages: Sequence[StageConditions], control: ControlReady | None) -> list[str]:
    dtypes = sorted({stage.dtype for stage in stages})
    if len(dtypes) > 1:
        computes = f", the control in {control.dtype}" if control else ""
        return [f"Unequal number formats: the stages compute in {' and '.join(dtypes)}{computes}."]
    if control is not None and control.dtype not in dtypes:
        return [f"Unequal number formats: the cluster computes in {dtypes[0]}, the control in {control.dtype}."]
    return []


def _of_compute(stages: Sequence[StageConditions], control: ControlReady | None, machine: str) -> list[str]:
    if control is None:
        return ["There is no control: nothing is said of what the split costs or brings."]
    said = []
    machines = sorted({stage.machine for stage in stages})
    if machines != [machine]:
        said.append(f"Unequal machines: the cluster is {', '.join(machines)}; the control is {machine} alone.")
    threads = [stage.threads for stage in stages]
    if not all(threads):
        said.append("Not every stage says with how many threads it computes.")
    elif sum(threads) != control.threads:
        said.append(
            f"Unequal threads: the cluster's stages have {' + '.join(map(str, threads))}, "
            f"the control has {control.threads}."
        )
    devices = sorted({stage.device for stage in stages if stage.device})
    if devices and devices != [control.device]:
        said.append(f"Unequal devices: the stages compute on {' and '.join(devices)}, the control on {control.device}.")
    return said
