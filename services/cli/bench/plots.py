"""Plots of the reports as PNG files, if matplotlib is installed (noodle's extra `plots`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from noodle.cluster.measuring import DeviceProfile
from services.cli.bench.profile_report import ProfileReport, decode_alone, prefill_alone
from services.cli.bench.report import BenchReport, Figures, was_busy
from services.cli.client.reports import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_COLOURS = {"cluster": "#1f6fb2", "control": "#c8641c"}
SESSION_COLOURS = ("#1f6fb2", "#2a9d6f", "#e0a100", "#c8371c")
PANEL_WIDTH_INCHES, PANEL_HEIGHT_INCHES = 4.6, 3.7
DOTS_PER_INCH = 120
BUSY = "\nThis machine was not idle before the start: unreliable"
DRAWING = "Drawing the plot. The first one on a machine takes up to a minute: matplotlib lists the fonts."
NOT_INSTALLED = "No plot: matplotlib is not installed here. Install it, or noodle's extra `plots`."


def draw_bench(report: BenchReport, path: Path) -> str:
    """Plot tokens per second, first token and waits between tokens over streams; return a line about the file."""
    if not has_matplotlib():
        return NOT_INSTALLED
    figure, rows = _figure(1)
    rates, firsts, waits = rows[0]
    for name, colour in SIDE_COLOURS.items():
        results = [result for result in report.results if getattr(result, name) is not None]
        if not results:  # no control was measured
            continue
        streams = [result.streams for result in results]
        figures: list[Figures] = [getattr(result, name) for result in results]
        rates.plot(streams, [each.tokens_per_second for each in figures], "o-", color=colour, label=name)
        firsts.plot(streams, [each.first_token_seconds for each in figures], "o-", color=colour, label=name)
        middle = [_milliseconds(each.between_tokens_seconds) for each in figures]
        late = [_milliseconds(each.between_tokens_p99_seconds) for each in figures]
        waits.plot(streams, middle, "o-", color=colour, label=f"{name}, median")
        waits.plot(streams, late, "^:", color=colour, label=f"{name}, p99")
    conditions = report.conditions
    for axes, title, unit in (
        (rates, "New tokens of all streams", "tokens/s"),
        (firsts, f"First token ({conditions.prompt_tokens} prompt tokens)", "s"),
        (waits, "Between two tokens of a stream", "ms"),
    ):
        _label(axes, title, "concurrent streams", unit, [result.streams for result in report.results])
    stages = " + ".join(f"{stage.layers} layers {stage.number_format}" for stage in conditions.stages)
    title = f"{report.model}, cluster of {stages}; measured on {report.machine}, {report.made_at[:10]}"
    figure.suptitle(title + (BUSY if was_busy(conditions.load_average, conditions.cores) else ""))
    return _save(figure, path)


def draw_profile(report: ProfileReport, path: Path) -> str:
    """Plot decode, prefill and threads in a row for each device; return a line about the file."""
    if not has_matplotlib():
        return NOT_INSTALLED
    devices = report.profile.devices
    figure, rows = _figure(len(devices))
    for device, (decode, prefill, threads) in zip(devices, rows, strict=True):
        _draw_device(device, decode, prefill, threads)
    name = report.model or report.profile.model_type
    busy = BUSY if was_busy(report.conditions.load_average, report.profile.cores) else ""
    figure.suptitle(f"{name}: one layer on {report.machine}, {report.made_at[:10]}{busy}")
    return _save(figure, path)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _draw_device(device: DeviceProfile, decode: Axes, prefill: Axes, threads: Axes) -> None:
    most = device.threads[0]
    name = f"{device.device}, {device.dtype}, {counted(most.threads, 'thread')}"
    steps = [(each.sessions, each.kv_tokens, each.layer_seconds) for each in most.decode]
    chunks = [
        (each.sessions, each.chunk_tokens, each.layer_seconds / each.chunk_tokens / each.sessions)
        for each in most.prefill
    ]
    for axes, points, title, length, unit in (
        (decode, steps, "Decode, one token a session", "KV rows of each session", "ms a layer"),
        (prefill, chunks, "Prefill", "chunk of each session (tokens)", "ms a layer and token"),
    ):
        for index, sessions in enumerate(sorted({point[0] for point in points})):
            lengths = [point[1] for point in points if point[0] == sessions]
            times = [point[2] * 1e3 for point in points if point[0] == sessions]
            axes.plot(lengths, times, "o-", color=_colour(index), label=counted(sessions, "session"))
        _label(axes, f"{title}\n{name}", length, unit, sorted({point[1] for point in points}))
    _draw_threads(device, threads)


def _draw_threads(device: DeviceProfile, axes: Axes) -> None:
    """Plot the speed-up of one session; empty if only one number of threads was measured."""
    if len(device.threads) < 2:
        axes.set_axis_off()
        return
    by_threads = sorted(device.threads, key=lambda each: each.threads)
    decode, prefill = decode_alone(device), prefill_alone(device)
    decodes = {
        each.threads: point.layer_seconds
        for each in by_threads
        for point in each.decode
        if decode is not None and (point.sessions, point.kv_tokens) == (1, decode.kv_tokens)
    }
    prefills = {
        each.threads: point.layer_seconds
        for each in by_threads
        for point in each.prefill
        if prefill is not None and (point.sessions, point.chunk_tokens) == (1, prefill.chunk_tokens)
    }
    for index, (label, seconds) in enumerate((("decode", decodes), ("prefill", prefills))):
        if seconds:
            fewest = next(iter(seconds.values()))
            speeds = [fewest / each for each in seconds.values()]
            axes.plot(list(seconds), speeds, "o-", color=_colour(2 * index), label=label)
    title = f"Speed of one session over threads\n{device.device}, {device.dtype}"
    _label(axes, title, "threads", "times the fewest threads' speed", sorted({*decodes, *prefills}))


def _figure(rows: int) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure of three columns that needs no display; says so before, for the first one takes long."""
    print(DRAWING, file=sys.stderr)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (PANEL_WIDTH_INCHES * 3, PANEL_HEIGHT_INCHES * rows + 0.4)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    return figure, [list(row) for row in axes]


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, format="png")
    return f"Plot: {path}"


def _label(axes: Axes, title: str, x_label: str, y_label: str, ticks: Sequence[float]) -> None:
    """Set title, units and a tick for each measured value (they double), with zero at the bottom."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(ticks) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend above the lines
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.8)


def _milliseconds(seconds: float | None) -> float:
    return float("nan") if seconds is None else seconds * 1e3


def _colour(index: int) -> str:
    return SESSION_COLOURS[index % len(SESSION_COLOURS)]
