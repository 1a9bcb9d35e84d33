"""Runs the model store as a process and shows what it reports; knows its lines, not how a model is made."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import msgspec
from msgspec import Struct

from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, StartError
from services.cli.client.progress import Progress
from services.cli.client.target import Target
from services.cli.local.cluster import python_module
from services.cli.local.processes import (
    Signals,
    end_group,
    exit_code_without_reaping,
    last_lines,
    lines_of,
    start_child,
)
from services.cli.local.run_state import writing

STOP_SECONDS = 10.0  # for the model store to remove what is half made, after SIGTERM
ROW = "model"


class StoreProgress(Struct, frozen=True):
    """What the model store does now; a total of 0 is unknown."""

    activity: Literal["download", "convert", "wait"]
    detail: str
    bytes_done: int = 0
    bytes_total: int = 0


class StoreError(Struct, frozen=True):
    """Why there is no model."""

    message: str
    cure: str = ""


class StoreLine(Struct, frozen=True):
    """One line of the model store's output: exactly one of the three is there."""

    progress: StoreProgress | None = None
    error: StoreError | None = None
    folder: str = ""
    name: str = ""


class PreparedModel(Struct, frozen=True):
    """A folder that every service can read, and what the model is called; empty when `noodle up` prepared it."""

    folder: Path
    name: str


def prepare_model(
    model: str,
    cache_dir: Path,
    environment: Mapping[str, str],
    log_path: Path | None,
    signals: Signals,
    progress: Progress,
) -> PreparedModel:
    """Fetch and convert the model unless that was done before; raises StartError or Interrupted.

    What the store says beside its reports goes to `log_path`, or to standard error without one.
    """
    arguments = ("--model", model, "--cache-dir", str(cache_dir), "--json")
    with contextlib.ExitStack() as stack:
        log = None
        if log_path is not None:
            with writing(log_path):
                log = stack.enter_context(log_path.open("ab"))
        process = start_child(
            python_module("services.coordinator.models.store", *arguments), environment, subprocess.PIPE, errors=log
        )
    assert process.stdout is not None  # noqa: S101  # it was asked for one line above
    progress.show(ROW, f"{model}: looking")
    try:
        prepared = _follow(process.stdout, signals, progress)
    finally:
        _end(process, signals)
        progress.finish(ROW, "")
    if prepared is None:
        lines = "\n".join(last_lines(log_path, 5)) if log_path else "Its last words stand above."
        raise StartError(f"Preparing the model {model} ended with exit code {process.returncode}.", cure=lines)
    return prepared


def find_model(
    target: Target, config: CommandConfig, environment: Mapping[str, str], signals: Signals, progress: Progress
) -> PreparedModel:
    """The unsplit model: what the `noodle up` of this machine prepared, or what NOODLE_MODEL names here."""
    if target.record is not None and target.record.model_folder:
        return PreparedModel(Path(target.record.model_folder), "")
    return prepare_model(config.model, config.cache_dir, environment, None, signals, progress)


def refuse_without_torch(what: str, cure: str) -> None:
    """Raise ConfigurationError before anything is fetched when the processes that compute would find no torch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigurationError(f"{what} needs torch, which is not installed here.", cure=cure)


def _follow(output: IO[bytes], signals: Signals, progress: Progress) -> PreparedModel | None:
    """Show each line until the last; None when the output ended without a result."""
    for line in lines_of(output, signals):
        said = msgspec.json.decode(line, type=StoreLine)
        if said.error is not None:
            raise StartError(said.error.message, cure=said.error.cure)
        if said.folder:
            return PreparedModel(Path(said.folder), said.name)
        if said.progress is not None:
            _show(said.progress, progress)
    return None


def _show(said: StoreProgress, progress: Progress) -> None:
    text = f"{said.activity}: {said.detail}"
    if not said.bytes_total:
        progress.show(ROW, text)
        return
    size = f"{said.bytes_done / 1e6:.0f} of {said.bytes_total / 1e6:.0f} MB"
    progress.show(ROW, f"{text}, {size}", min(1.0, said.bytes_done / said.bytes_total))


def _end(process: subprocess.Popen[bytes], signals: Signals) -> None:
    """Leave no model store behind; one that is still at work clears up first, and a second Ctrl-C hurries it."""
    requests_before = signals.stop_requests
    if signals.stop_requested:
        end_group(process, signal.SIGTERM)
    for _ in range(2 * int(STOP_SECONDS)):
        if exit_code_without_reaping(process) is not None or signals.stop_requests > requests_before:
            break
        signals.wait(0.5)
    end_group(process, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
