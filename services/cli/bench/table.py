"""Prints a report of `noodle bench` for people: conditions, table, remarks."""

from __future__ import annotations

from rich.table import Table

from services.cli.bench.report import BenchConditions, BenchReport, StreamsResult
from services.cli.bench.statistics import Figures
from services.cli.client.reports import print_table

COLUMNS = (
    "streams",
    "",
    "first token (ms)",
    "between tokens p50 (ms)",
    "p99 (ms)",
    "prefill tokens/s",
    "tokens/s",
    "ratio",
)


def print_report(report: BenchReport) -> None:
    """The whole report on standard output."""
    conditions = report.conditions
    print(
        f"{report.model} on {report.machine}, {report.made_at}: {conditions.prompt_tokens} prompt tokens and "
        f"{conditions.new_tokens} new ones a stream, greedy, past any end of text; medians of "
        f"{counted(conditions.pairs, 'run')} a side."
    )
    for line in computing_lines(conditions):
        print(line)
    table = Table(box=None, pad_edge=False)
    for title in COLUMNS:
        table.add_column(title, justify="left" if not title else "right")
    for result in report.results:
        table.add_row(str(result.streams), "cluster", *_cells(result.cluster), _ratio(result))
        if result.control is not None:
            table.add_row("", "control", *_cells(result.control), "")
    print_table(table)
    if any(result.ratio for result in report.results):
        print("ratio: tokens/s of the cluster over the control's, median of pairs of runs (least to most).")
    for remark in report.remarks:
        print(f"- {remark}")


def computing_lines(conditions: BenchConditions) -> list[str]:
    """Who computes with what, a line each."""
    lines = []
    for stage in conditions.stages:
        device = f"{stage.device} ({stage.device_name}), " if stage.device else ""
        threads = f", {counted(stage.threads, 'thread')}" if stage.threads else ""
        lines.append(f"stage {stage.stage_id}: {stage.machine}, {stage.layers} layers, {device}{stage.dtype}{threads}")
    if (control := conditions.control) is not None:
        lines.append(
            f"control: unsplit, transformers {control.transformers_version} generate(), {control.device} "
            f"({control.device_name}), {control.dtype}, {counted(control.threads, 'thread')} on "
            f"{counted(control.cores, 'core')}"
        )
    return lines


def counted(number: int, noun: str) -> str:
    """As 1 thread, 2 threads."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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


def _ratio(result: StreamsResult) -> str:
    if result.ratio is None:
        return ""
    return f"{result.ratio.median:.2f} ({result.ratio.least:.2f} to {result.ratio.most:.2f})"
