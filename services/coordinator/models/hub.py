"""Fetches a model's safetensors, config and tokenizer from a Hugging Face hub; knows the hub's errors, not our cache's.

What is in the cache is used without asking the hub, so a restart needs no internet and never changes the model under
a running cluster; another state of the repository is asked for by its revision.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

import msgspec

from noodle.errors import ModelNotFound, StartError, UnsupportedModel
from noodle.folders import DISK_ERRORS, not_writable
from noodle.model.files import INDEX_NAME
from services.coordinator.models.progress import Progress, ReportProgress

log = logging.getLogger(__name__)

CACHE_VARIABLE = "NOODLE_CACHE_DIR"
LIST_TIMEOUT_SECONDS = 20  # for the list of files; the download itself has huggingface_hub's own timeouts
POLL_SECONDS = 0.5
SPARE_DISK_BYTES = 64 << 20
# nothing that could run code: no pickle, no Python
WANTED_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
# the same weights a second time, in another project's layout
UNWANTED_FILES = ("consolidated*", "*.gguf", "adapter_*")
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as org/name or org/name@revision."""
    organisation, slash, name = model.partition("@")[0].partition("/")
    return bool(slash) and all(
        part and part[0] not in ".-" and ID_CHARACTERS.issuperset(part) for part in (organisation, name)
    )


def fetch_from_hub(model: str, cache_dir: Path, progress: ReportProgress) -> Path:
    """The folder with the files of `org/name[@revision]`; raises ModelNotFound or UnsupportedModel."""
    repository, _, revision = model.partition("@")
    hub_dir = cache_dir / "hub"
    before = _fetched_before(model, hub_dir)
    if before is not None:
        return before
    # here and not above: the hub's client takes half a second to import, and only a download needs it
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of all its network errors

    progress(Progress("download", f"asking the hub for {model}"))
    try:
        info = HfApi().model_info(
            repository, revision=revision or None, files_metadata=True, timeout=LIST_TIMEOUT_SECONDS
        )
        sizes = wanted_files({file.rfilename: file.size or 0 for file in info.siblings or []}, model)
        total_bytes = sum(sizes.values())
        hub_dir.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(hub_dir).free
        if free_bytes < total_bytes + SPARE_DISK_BYTES:
            raise StartError(
                f"{model} takes {total_bytes + SPARE_DISK_BYTES} bytes on disk, {hub_dir} has {free_bytes} free.",
                cure="Free some disk space, or set NOODLE_CACHE_DIR to a folder on another disk.",
            )
        with _reported(hub_dir, model, total_bytes, progress):
            folder = Path(
                snapshot_download(
                    repository, revision=revision or None, cache_dir=hub_dir, allow_patterns=sorted(sizes)
                )
            )
        try:
            _remember(model, hub_dir, folder)
        except OSError as error:
            log.warning("%s is asked for anew at each start: %s", model, not_writable(hub_dir, CACHE_VARIABLE, error))
        return folder
    # OSError: no connection, no space, offline mode and the hub's cache errors all derive from it
    except (HTTPError, OSError) as error:
        raise _explained(model, hub_dir, error) from error


def wanted_files(sizes: dict[str, int], model: str) -> dict[str, int]:
    """Of a repository's files with their bytes, those that are fetched; raises UnsupportedModel without safetensors."""
    wanted = {
        name: size
        for name, size in sizes.items()
        if "/" not in name
        and any(fnmatch(name, pattern) for pattern in WANTED_FILES)
        and not any(fnmatch(name, pattern) for pattern in UNWANTED_FILES)
    }
    weights = [name for name in wanted if name.endswith(".safetensors")]
    if not weights:
        raise UnsupportedModel(
            f"{model} has no weights as safetensors on the hub (pickle is not loaded: it can run any code).",
            cure="Look for a converted copy or a revision with safetensors (often refs/pr/N: name it as org/name@rev).",
        )
    if "model.safetensors" in weights and INDEX_NAME not in wanted:
        # other files beside it are variants (fp16, onnx exports) of the same weights
        return {name: size for name, size in wanted.items() if name not in weights or name == "model.safetensors"}
    return wanted


class _Fetched(msgspec.Struct, frozen=True):
    """Where an earlier download lies, below the hub's folder in our cache; written when it was whole."""

    snapshot: str
    sizes: dict[str, int]


def _record_path(model: str, hub_dir: Path) -> Path:
    return hub_dir / f"{quote(model, safe='@')}.json"


def _fetched_before(model: str, hub_dir: Path) -> Path | None:
    """The folder of an earlier download, if every file still stands there in full length."""
    try:
        fetched = msgspec.json.decode(_record_path(model, hub_dir).read_bytes(), type=_Fetched)
        folder = hub_dir / fetched.snapshot
        whole = all((folder / name).stat().st_size == size for name, size in fetched.sizes.items())
    except (OSError, msgspec.DecodeError):
        return None
    return folder if whole else None


def _remember(model: str, hub_dir: Path, folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    fetched = _Fetched(str(folder.resolve().relative_to(hub_dir.resolve())), sizes)
    path = _record_path(model, hub_dir)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(msgspec.json.encode(fetched))
    unfinished.replace(path)


@contextmanager
def _reported(hub_dir: Path, model: str, total_bytes: int, progress: ReportProgress) -> Iterator[None]:
    """Report how much the cache has grown; counting bytes on disk works for each of the hub's ways to download."""
    before_bytes = _bytes_under(hub_dir)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            done_bytes = min(_bytes_under(hub_dir) - before_bytes, total_bytes)
            progress(Progress("download", model, done_bytes, total_bytes))

    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.glob("**/blobs/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # renamed from its .incomplete name while we looked
    return total


def _explained(model: str, hub_dir: Path, error: Exception) -> StartError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # what the network raises has none of these
        return not_writable(hub_dir, CACHE_VARIABLE, error)
    if isinstance(error, GatedRepoError):
        return ModelNotFound(
            f"{model} is gated: its owner lets only those in who have agreed to its terms.",
            cure="Agree on its page on the hub, then set HF_TOKEN to your access token.",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"The hub has no such revision: {model}.", cure="Look up its branches, tags and commits on its page."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"The hub has no model {model}, or it is private.",
            cure="Check the spelling (org/name); for a private one set HF_TOKEN to your access token.",
        )
    return ModelNotFound(
        f"{model} could not be fetched from the hub ({type(error).__name__}: {error}).",
        cure="Connect this machine to the hub, or set NOODLE_MODEL to a folder or a .gguf file on this machine.",
    )
