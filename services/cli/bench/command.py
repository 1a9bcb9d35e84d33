"""`noodle bench`: the cluster against the unsplit model on this machine, in turn; the coordinator keeps the report.

Asks the cluster over HTTP (bench_cluster.py) and the unsplit model in a process of its own (control.py); what counts
is in bench_statistics.py, what must be said in bench_report.py.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from noodle import __version__
from noodle.cluster.measuring import ControlReady
from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, NotReady
from noodle.model.files import model_digest
from services.cli.bench.cluster import Prompt, prompts_of, run_streams, text_token_ids
from services.cli.bench.control import Control, control_question, cores_of_stages, open_control
from services.cli.bench.plots import draw_bench
from services.cli.bench.report import BenchConditions, BenchReport, StageConditions, StreamsResult, headline, remarks
from services.cli.bench.statistics import RunTimes, figures_of, ratio_of
from services.cli.bench.table import print_report
from services.cli.client.health import Health, ask_health
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import check_folder, keep_report, print_json, write_report
from services.cli.client.target import Target
from services.cli.local.preparation import find_model, refuse_without_torch
from services.cli.local.processes import Interrupted, Signals, usable_cores

WARM_UP_TOKENS = 4  # new ones, after a whole prompt: memory, threads and connections are in use once

RunSide = Callable[[tuple[Prompt, ...], int], RunTimes]


@dataclass(frozen=True)
class BenchWish:
    """What is to be measured."""

    streams: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    pairs: int
    with_control: bool


def bench(
    target: Target,
    config: CommandConfig,
    environment: Mapping[str, str],
    wish: BenchWish,
    output: Path,
    *,
    as_json: bool,
) -> int:
    """Measure, print, write files into `output`, and give the report to the coordinator; raises NoodleError."""
    check_folder(output)
    if wish.with_control:
        refuse_without_torch("The control", "Use --no-control, or install noodle's extra `stage` (`make setup`).")
    health = _ready_health(target)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    progress = open_progress(sys.stderr)
    try:
        with Signals() as signals:
            report = _measure(target, config, environment, wish, health, load_average, signals, progress)
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        progress.close()
    name = f"noodle-bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path = write_report(output, name, report)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    print(f"Written: {path}", file=sys.stderr)
    print(draw_bench(report, output / f"{name}.png"), file=sys.stderr)
    print(f"Kept by {target.url} as {keep_report(target, 'bench', report)}.", file=sys.stderr)
    return 0


def _ready_health(target: Target) -> Health:
    health = ask_health(target.url, target.token or target.credential)
    if health.status != "ready":
        raise NotReady(f"The cluster at {target.url} is not ready: {health.text()}", cure="See `noodle status`.")
    return health


def _measure(
    target: Target,
    config: CommandConfig,
    environment: Mapping[str, str],
    wish: BenchWish,
    health: Health,
    load_average: float | None,
    signals: Signals,
    progress: Progress,
) -> BenchReport:
    stages = _stages(health)
    context_length = int(health.answer.get("context_length") or 0)
    if context_length and wish.prompt_tokens + wish.new_tokens > context_length:
        raise ConfigurationError(
            f"{wish.prompt_tokens} prompt tokens and {wish.new_tokens} new ones pass the cluster's context of "
            f"{context_length} tokens.",
            cure="Give smaller --prompt-tokens or --new-tokens.",
        )
    ready: ControlReady | None = None
    digest = control_model = ""
    progress.show("bench", "cluster: prompts")
    text_ids = text_token_ids(target)
    sides: dict[str, RunSide] = {"cluster": lambda prompts, new: run_streams(target, prompts, new, signals)}
    with contextlib.ExitStack() as stack:
        if wish.with_control:
            model = find_model(target, config, environment, signals, progress)
            digest, control_model = model_digest(model.folder), model.name or str(health.answer.get("model"))
            cores = cores_of_stages(target.record)
            question = control_question(model.folder, context_length, stages, config.machine, cores, usable_cores())
            progress.show("bench", "control: loading the unsplit model")
            control = Control(stack.enter_context(open_control(environment, signals)))
            ready = control.load(question)
            sides["control"] = control.run
        results = _run_all(wish, sides, text_ids, progress)
    progress.finish("bench", "")
    conditions = BenchConditions(
        noodle_version=__version__,
        coordinator_version=str(health.answer.get("version", "")),
        url=target.url,
        stages=stages,
        plan_version=int(health.answer.get("plan") or 0),
        plan_reason=str(health.answer.get("plan_reason") or ""),
        context_length=context_length,
        model_digest=digest,
        control_model=control_model,
        prompt_tokens=wish.prompt_tokens,
        new_tokens=wish.new_tokens,
        pairs=wish.pairs,
        warm_up_tokens=min(WARM_UP_TOKENS, wish.new_tokens),
        cores=usable_cores(),
        load_average=load_average,
        control=ready,
    )
    served = str(health.answer.get("model") or "")
    return BenchReport(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=config.machine,
        model=served,
        headline=headline(results),
        conditions=conditions,
        results=tuple(results),
        remarks=remarks(conditions, wish.streams, config.machine, served),
    )


def _run_all(
    wish: BenchWish, sides: Mapping[str, RunSide], text_ids: Prompt, progress: Progress
) -> list[StreamsResult]:
    """For each number of streams: a warm-up of each side, then pairs of runs, the first of a pair changing."""
    total = len(wish.streams) * (1 + wish.pairs) * len(sides)
    done = 0

    def run(side: str, streams: int, number: int, new_tokens: int, what: str) -> RunTimes:
        nonlocal done
        progress.show("bench", f"{streams} at once, {what}: {side}", done / total)
        times = sides[side](prompts_of(text_ids, wish.prompt_tokens, streams, number), new_tokens)
        done += 1
        return times

    results = []
    for streams in wish.streams:
        for side in sides:
            run(side, streams, 0, min(WARM_UP_TOKENS, wish.new_tokens), "warm-up")
        runs: dict[str, list[RunTimes]] = {side: [] for side in sides}
        for pair in range(1, wish.pairs + 1):
            for side in sides if pair % 2 else reversed(list(sides)):
                runs[side].append(run(side, streams, pair, wish.new_tokens, f"run {pair} of {wish.pairs}"))
        if "control" in runs:
            ratio = ratio_of(runs["cluster"], runs["control"])
            results.append(StreamsResult(streams, figures_of(runs["cluster"]), figures_of(runs["control"]), ratio))
        else:
            results.append(StreamsResult(streams, figures_of(runs["cluster"])))
    return results


def _stages(health: Health) -> tuple[StageConditions, ...]:
    """The stages that have layers, in the plan's order."""
    return tuple(
        StageConditions(
            stage_id=int(stage["stage_id"]),
            machine=str(stage.get("machine", "")),
            layers=stage["layers"][1] - stage["layers"][0],
            dtype=str(stage.get("dtype", "")),
            device=str(stage.get("device", "")),
            device_name=str(stage.get("device_name", "")),
            threads=int(stage.get("threads", 0)),
        )
        for stage in health.answer.get("stages") or []
        if stage.get("layers")
    )
