"""`noodle profile`: what this machine does for the model, measured by the stage's own code; the coordinator gets it.

The measuring is a stage's (services/stage/tools/profile.py), in a process of its own.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from noodle import __version__
from noodle.cluster.measuring import MachineProfile, ProfileLine, ProfileQuestion
from noodle.config.settings import CommandConfig
from noodle.errors import NoodleError
from services.cli.bench.plots import draw_profile
from services.cli.bench.profile_report import ProfileConditions, ProfileReport, headline, remarks
from services.cli.bench.profile_table import print_report
from services.cli.client.conversation import Conversation
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import check_folder, keep_report, print_json, write_report
from services.cli.client.target import Target
from services.cli.local.preparation import find_model, refuse_without_torch
from services.cli.local.processes import Interrupted, Signals

SILENCE_SECONDS = 900.0  # one line to the next: loading a slice from a slow disk, waiting for stages that measure


def profile(
    target: Target,
    config: CommandConfig,
    environment: Mapping[str, str],
    output: Path,
    *,
    is_quick: bool,
    as_json: bool,
) -> int:
    """Measure, print, write files into `output` and give the report to the coordinator.

    Raises NoodleError when it can not be measured. A coordinator that can not be reached is said, no error: a machine
    may be measured before there is a cluster.
    """
    check_folder(output)
    refuse_without_torch(
        "Measuring", "Run `noodle profile` where a stage is installed (`make setup`, or noodle's extra `stage`)."
    )
    conditions = ProfileConditions(
        noodle_version=__version__,
        is_quick=is_quick,
        step_tokens=config.step_tokens,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        noodle_runs_here=target.record is not None,
    )
    progress = open_progress(sys.stderr)
    try:
        with Signals() as signals:
            model = find_model(target, config, environment, signals, progress)
            question = ProfileQuestion(
                folder=str(model.folder),
                device=config.device,
                dtype=config.dtype,
                threads=config.threads,
                step_tokens=config.step_tokens,
                cache_dir=str(config.cache_dir),
                is_quick=is_quick,
            )
            measured = _measure(question, environment, signals, progress)
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        progress.close()
    report = ProfileReport(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=config.machine,
        model=model.name or (target.record.model if target.record else ""),
        headline=headline(measured),
        conditions=conditions,
        profile=measured,
        remarks=remarks(conditions, measured),
    )
    name = f"noodle-profile-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path = write_report(output, name, report)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    print(f"Written: {path}", file=sys.stderr)
    print(draw_profile(report, output / f"{name}.png"), file=sys.stderr)
    try:
        print(f"Kept by {target.url} as {keep_report(target, 'profile', report)}.", file=sys.stderr)
    except NoodleError as error:
        print(f"Not kept by a coordinator: {error}", file=sys.stderr)
    return 0


def _measure(
    question: ProfileQuestion, environment: Mapping[str, str], signals: Signals, progress: Progress
) -> MachineProfile:
    """Run the process to its end; raises NoodleError or Interrupted."""
    progress.show("profile", "starting")
    with Conversation("services.stage.tools.profile", "profile", environment, signals) as conversation:
        conversation.say(question)
        while True:
            line = conversation.hear(ProfileLine, SILENCE_SECONDS)
            if line.profile is not None:
                progress.finish("profile", "")
                return line.profile
            if line.progress is not None:
                progress.show("profile", line.progress.text, line.progress.fraction)
