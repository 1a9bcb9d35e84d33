"""`noodle profile`: measures what this machine does for the model, with the stage's code in its own process."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Mapping

from noodle import __version__
from noodle.cluster.measuring import MachineProfile, ProfileLine, ProfileQuestion
from noodle.config.environment import command_config, process_environment
from noodle.errors import NoodleError
from services.cli.bench.plots import draw_profile
from services.cli.bench.profile_report import ProfileConditions, ProfileReport, headline, print_report, remarks
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import output_folder, print_stored, store_report, wants_stored, write_and_print
from services.cli.client.target import find_target
from services.cli.local.conversation import Conversation
from services.cli.local.preparation import find_model
from services.cli.local.processes import Signals, python_module

SILENCE_SECONDS = 900.0  # between two lines: loading a slice from a slow disk, waiting for stages that measure


def profile(options: argparse.Namespace) -> int:
    """Measure and report, or print what the coordinator stores.

    A coordinator that cannot be reached is no error: a machine may be measured before there is a cluster.
    """
    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    if wants_stored(options, ("quick", "output")):
        return print_stored(options, target, "profile", ProfileReport, print_report)
    folder = output_folder(options.output)
    conditions = ProfileConditions(
        noodle_version=__version__,
        is_quick=bool(options.quick),
        step_tokens=config.step_tokens,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        noodle_runs_here=target.record is not None,
    )
    with contextlib.closing(open_progress(sys.stderr)) as progress, Signals() as signals:
        model = find_model(target, config, environment, signals, progress)
        question = ProfileQuestion(
            folder=str(model.path),
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            step_tokens=config.step_tokens,
            cache_dir=str(config.cache_dir),
            is_quick=conditions.is_quick,
        )
        measured = _measure(question, environment, signals, progress)
    report = ProfileReport(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=config.machine,
        model=model.name or (target.record.model if target.record else ""),
        headline=headline(measured),
        conditions=conditions,
        profile=measured,
        remarks=remarks(conditions, measured),
    )
    write_and_print("profile", report, folder, as_json=options.json, print_report=print_report, draw=draw_profile)
    try:
        print(f"Stored by {target.url} as {store_report(target, 'profile', report)}.", file=sys.stderr)
    except NoodleError as error:
        print(f"Not stored by a coordinator: {error}", file=sys.stderr)
    return 0


def _measure(
    question: ProfileQuestion, environment: Mapping[str, str], signals: Signals, progress: Progress
) -> MachineProfile:
    """Run the process to its end; raises NoodleError or Interrupted."""
    progress.show("profile", "starting")
    with Conversation(python_module("services.stage.tools.profile"), "profile", environment, signals) as process:
        process.send(question)
        while True:
            line = process.receive(ProfileLine, SILENCE_SECONDS)
            if line.profile is not None:
                progress.finish("profile")
                return line.profile
            if line.progress is not None:
                progress.show("profile", line.progress.text, line.progress.fraction)
