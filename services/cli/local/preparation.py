"""The model for `noodle up`, `verify`, `bench` and `profile`: runs the model store as a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from msgspec import Struct

from noodle.cluster.measuring import ProcessError, StoreProgress
from noodle.cluster.transfer import TransferClock
from noodle.config.settings import CommandConfig
from noodle.errors import StartError
from services.cli.client.progress import Progress
from services.cli.client.target import Target
from services.cli.local.conversation import Conversation, ProcessEnded
from services.cli.local.processes import Signals, last_lines, python_module
from services.cli.local.run_folder import writing

STOP_SECONDS = 10.0  # from SIGTERM until the model store has removed what is half written
ROW = "model"


class StoreLine(Struct, frozen=True):
    """One line of the model store's output: progress, a note, an error, or the path and name of the model."""

    progress: StoreProgress | None = None
    note: str = ""
    error: ProcessError | None = None
    path: str = ""
    name: str = ""


class PreparedModel(Struct, frozen=True):
    """A GGUF file or a folder that every service can read, and the model's name; empty if `noodle up` prepared it."""

    path: Path
    name: str


def prepare_model(
    model: str,
    config: CommandConfig,
    environment: Mapping[str, str],
    signals: Signals,
    progress: Progress,
    *,
    log_path: Path | None = None,
) -> PreparedModel:
    """Find the model, or fetch it unless it is in the cache; raises StartError or Interrupted.

    What the store prints beside its reports goes to `log_path`, or to standard error without one.
    """
    arguments = ("--model", model, "--cache-dir", str(config.cache_dir), "--json")
    with contextlib.ExitStack() as stack:
        errors: IO[bytes] | None = None
        if log_path is not None:
            with writing(log_path):
                errors = stack.enter_context(log_path.open("ab"))
        store = Conversation(
            python_module("services.coordinator.models.store", *arguments),
            "model store",
            environment,
            signals,
            errors=errors,
            grace_seconds=STOP_SECONDS,
        )
        progress.show(ROW, f"looking for the model {model}")
        try:
            with store:
                return _follow(store, progress)
        except ProcessEnded as error:
            cure = "\n".join(last_lines(log_path, 5)) if log_path else "See its last lines above."
            code = store.process.returncode
            raise StartError(f"Preparing the model {model} ended with exit code {code}.", cure=cure) from error
        finally:
            progress.finish(ROW)


def find_model(
    target: Target, config: CommandConfig, environment: Mapping[str, str], signals: Signals, progress: Progress
) -> PreparedModel:
    """Return the unsplit model: what this machine's `noodle up` prepared, else what NOODLE_MODEL names here."""
    if target.record is not None and target.record.model_path:
        return PreparedModel(Path(target.record.model_path), "")
    return prepare_model(config.model, config, environment, signals, progress)


def _follow(store: Conversation, progress: Progress) -> PreparedModel:
    clock = TransferClock()
    while True:
        line = store.receive(StoreLine)
        if line.path:
            return PreparedModel(Path(line.path), line.name)
        if line.note:
            progress.log(line.note)
        if (done := line.progress) is None:
            continue
        fraction = min(1.0, done.bytes_done / done.bytes_total) if done.bytes_total else None
        progress.show(ROW, done.text(clock), fraction)
