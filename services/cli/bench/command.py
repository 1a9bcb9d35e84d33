"""`noodle bench`: times the cluster against the unsplit model on this machine, in turn."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from noodle import __version__
from noodle.cluster.measuring import ControlReady
from noodle.config.cores import usable_cores
from noodle.config.environment import command_config, process_environment
from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError
from noodle.installation import require_transformers
from noodle.model.files import model_digest
from services.cli.bench import report
from services.cli.bench.cluster import Prompt, prompts_of, run_streams, text_token_ids
from services.cli.bench.control import Control, control_question, cores_of_stages
from services.cli.bench.plots import draw_bench
from services.cli.client.health import Health, require_ready
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import output_folder, print_stored, store_report, wants_stored, write_and_print
from services.cli.client.target import Target, find_target
from services.cli.local.conversation import Conversation
from services.cli.local.preparation import find_model
from services.cli.local.processes import Signals, python_module

WARM_UP_TOKENS = 4  # new tokens of a warm-up, after a whole prompt: memory, threads and connections are in use then

RunSide = Callable[[tuple[Prompt, ...], int], report.RunTimes]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    streams: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    pairs: int
    with_control: bool


def bench(options: argparse.Namespace) -> int:
    """Measure and report, or print what the coordinator stores; raises NoodleError."""
    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    if wants_stored(options, ("streams", "prompt_tokens", "new_tokens", "pairs", "no_control", "output")):
        return print_stored(options, target, "bench", report.BenchReport, report.print_report)
    wanted = BenchOptions(
        streams=options.streams or (1, 2, 4, 8),
        prompt_tokens=options.prompt_tokens or 128,
        new_tokens=options.new_tokens or 64,
        pairs=options.pairs or 5,
        with_control=not options.no_control,
    )
    folder = output_folder(options.output)
    if wanted.with_control:
        require_transformers("The control", otherwise="Or use --no-control.")
    health = require_ready(target)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before anything is started
    with contextlib.closing(open_progress(sys.stderr)) as progress, Signals() as signals:
        measured = Measuring(
            target=target,
            config=config,
            environment=environment,
            health=health,
            wanted=wanted,
            load_average=load_average,
            signals=signals,
            progress=progress,
        ).run()
    write_and_print("bench", measured, folder, as_json=options.json, print_report=report.print_report, draw=draw_bench)
    print(f"Stored by {target.url} as {store_report(target, 'bench', measured)}.", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """One run of `noodle bench`, from the prompts to the report."""

    target: Target
    config: CommandConfig
    environment: Mapping[str, str]
    health: Health
    wanted: BenchOptions
    load_average: float | None
    signals: Signals
    progress: Progress

    def run(self) -> report.BenchReport:
        """Measure both sides; raises NoodleError or Interrupted."""
        wanted, context_length = self.wanted, self.health.context_length
        if context_length and wanted.prompt_tokens + wanted.new_tokens > context_length:
            raise ConfigurationError(
                f"{wanted.prompt_tokens} prompt tokens and {wanted.new_tokens} new tokens exceed the cluster's context "
                f"of {context_length} tokens.",
                cure="Give smaller --prompt-tokens or --new-tokens.",
            )
        ready: ControlReady | None = None
        digest = control_model = ""
        self.progress.show("bench", "cluster: prompts")
        text_ids = text_token_ids(self.target)
        sides: dict[str, RunSide] = {
            "cluster": lambda prompts, new: run_streams(self.target, prompts, new, self.signals)
        }
        with contextlib.ExitStack() as stack:
            if wanted.with_control:
                model = find_model(self.target, self.config, self.environment, self.signals, self.progress)
                digest, control_model = model_digest(model.path), model.name or self._served_model
                self.progress.show("bench", "control: loading the unsplit model")
                module = python_module("services.stage.tools.control")
                conversation = Conversation(module, "unsplit model", self.environment, self.signals)
                control = Control(stack.enter_context(conversation))
                ready = control.load(
                    control_question(
                        model.path,
                        context_length,
                        _stages(self.health),
                        self.config.machine,
                        stage_cores=cores_of_stages(self.target.record),
                        own_cores=usable_cores(),
                    )
                )
                sides["control"] = control.run
            results = self._run_all(sides, text_ids)
        self.progress.finish("bench")
        conditions = self._conditions(ready, digest, control_model)
        return report.BenchReport(
            made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=self.config.machine,
            model=self._served_model,
            headline=report.headline(results),
            conditions=conditions,
            results=tuple(results),
            remarks=report.remarks(conditions, wanted.streams, self.config.machine, self._served_model),
        )

    @property
    def _served_model(self) -> str:
        return str(self.health.answer.get("model") or "")

    def _conditions(self, control: ControlReady | None, digest: str, control_model: str) -> report.BenchConditions:
        wanted, answer = self.wanted, self.health.answer
        return report.BenchConditions(
            noodle_version=__version__,
            coordinator_version=str(answer.get("version", "")),
            url=self.target.url,
            stages=_stages(self.health),
            plan_version=int(answer.get("plan") or 0),
            plan_reason=str(answer.get("plan_reason") or ""),
            context_length=self.health.context_length,
            model_digest=digest,
            control_model=control_model,
            prompt_tokens=wanted.prompt_tokens,
            new_tokens=wanted.new_tokens,
            pairs=wanted.pairs,
            warm_up_tokens=min(WARM_UP_TOKENS, wanted.new_tokens),
            cores=usable_cores(),
            load_average=self.load_average,
            control=control,
        )

    def _run_all(self, sides: Mapping[str, RunSide], text_ids: Prompt) -> list[report.StreamsResult]:
        """For each number of streams, warm up both sides and then run them in pairs, each going first in turn."""
        wanted = self.wanted
        total = len(wanted.streams) * (1 + wanted.pairs) * len(sides)
        done = 0

        def run(side: str, streams: int, number: int) -> report.RunTimes:
            nonlocal done
            text = f"run {number} of {wanted.pairs}" if number else "warm-up"
            self.progress.show("bench", f"{streams} concurrent, {text}: {side}", done / total)
            new_tokens = wanted.new_tokens if number else min(WARM_UP_TOKENS, wanted.new_tokens)
            times = sides[side](prompts_of(text_ids, wanted.prompt_tokens, streams, number), new_tokens)
            done += 1
            return times

        results = []
        for streams in wanted.streams:
            for side in sides:
                run(side, streams, 0)
            runs: dict[str, list[report.RunTimes]] = {side: [] for side in sides}
            for pair in range(1, wanted.pairs + 1):
                for side in sides if pair % 2 else reversed(list(sides)):
                    runs[side].append(run(side, streams, pair))
            control = ratio = None
            if "control" in runs:
                control, ratio = report.figures_of(runs["control"]), report.ratio_of(runs["cluster"], runs["control"])
            results.append(report.StreamsResult(streams, report.figures_of(runs["cluster"]), control, ratio))
        return results


def _stages(health: Health) -> tuple[report.StageConditions, ...]:
    """Return the stages that have layers, in the plan's order."""
    return tuple(
        report.StageConditions(
            stage_id=int(stage["stage_id"]),
            machine=str(stage.get("machine", "")),
            layers=stage["layers"][1] - stage["layers"][0],
            dtype=str(stage.get("dtype", "")),
            device=str(stage.get("device", "")),
            device_name=str(stage.get("device_name", "")),
            threads=int(stage.get("threads", 0)),
            executor=str(stage.get("executor") or ""),
            weights=str(stage.get("weights") or ""),
        )
        for stage in health.stages
        if stage.get("layers")
    )
