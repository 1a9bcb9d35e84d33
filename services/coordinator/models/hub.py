"""Fetch a model from a Hugging Face hub: its safetensors, config and tokenizer, or one of its GGUF files.

A cached model is used without a request to the hub, so a restart needs no internet and never changes the model of a
running cluster. Another state of the repository is named by its revision.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, StartError, UnsupportedModel
from noodle.folders import DISK_ERRORS, not_writable, write_atomically
from noodle.model.files import INDEX_NAME
from noodle.model.gguf import part_paths, read_gguf
from services.coordinator.models.hub_download import HubFile, begin_with, bytes_here, download
from services.coordinator.models.hub_gguf import choose_gguf
from services.coordinator.models.hub_headers import fetch_headers
from services.coordinator.models.locks import CACHE_VARIABLE, locked
from services.coordinator.models.progress import ReportProgress, at_intervals

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

log = logging.getLogger(__name__)

GGUF, SAFETENSORS = ".gguf", ".safetensors"
HEADERS_FOLDER = "headers"  # in the folder of a commit
GGUF_FOLDER = "gguf"  # below the hub's folder in the cache: a folder for each repository, in it one for each commit
LIST_TIMEOUT_SECONDS = 20  # for the list of files; the download has huggingface_hub's own timeouts
POLL_SECONDS = 0.5
SPARE_DISK_BYTES = 64 << 20  # for the tokenizer, manifests and logs
# nothing that can run code: no pickle, no Python
WANTED_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
# copies of the weights in other layouts
UNWANTED_FILES = ("consolidated*", "*.gguf", "adapter_*")
# org/name, org/name@revision, org/name:format or org/name:file.gguf; a revision of git has no colon
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:]*))?(:(?P<file>.+))?", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a hub id; `folder/model.gguf` is a path, even if there is no such file."""
    match = HUB_ID.fullmatch(model)
    return match is not None and not match["repository"].lower().endswith((".gguf", ".safetensors"))


def fetch_from_hub(model: str, cache_dir: Path, progress: ReportProgress, *, is_whole: bool = True) -> Path:
    """Fetch `org/name[@revision][:format or file.gguf]` unless it is cached.

    Returns the folder with safetensors, or the GGUF file (of a split one its first part). Unless `is_whole`, the GGUF
    file may be one that `hub_headers` wrote, without its tensors. Raises StartError.
    """
    hub_dir = cache_dir / "hub"
    whole, headers = (hub_dir / f"{quote(model, safe='@')}{end}" for end in (".json", ".headers.json"))
    for record_path in (whole,) if is_whole else (whole, headers):
        if (cached := _cached_model(record_path)) is not None:
            return cached
    # not imported above: the hub's client takes half a second to import, and only a download needs it
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # base of all its network errors

    match = HUB_ID.fullmatch(model)
    assert match is not None  # noqa: S101  # is_hub_id
    progress(StoreProgress("download", f"asking the hub for {model}"))
    try:
        info = HfApi().model_info(
            match["repository"], revision=match["revision"] or None, files_metadata=True, timeout=LIST_TIMEOUT_SECONDS
        )
        files = {file.rfilename: file for file in info.siblings or []}
        hub_dir.mkdir(parents=True, exist_ok=True)
        has_gguf, has_safetensors = (any(name.lower().endswith(end) for name in files) for end in (GGUF, SAFETENSORS))
        if match["file"] or (has_gguf and not has_safetensors):
            names = choose_gguf(files, match["file"] or "", model)
            folder = hub_dir / GGUF_FOLDER / info.id.replace("/", "--") / (info.sha or "main")
            folder.mkdir(parents=True, exist_ok=True)
            parts = _hub_files(info, names)
            with locked(folder / "lock", progress):
                found = fetch_headers(parts, folder / HEADERS_FOLDER)  # refuses what noodle does not run
                if is_whole:
                    found = _fetch_gguf(parts, found, folder, progress)
        else:
            found, record_path = _fetch_folder(model, info, match["revision"], hub_dir, progress), whole
        try:
            write_atomically(record_path, msgspec.json.encode(_record_of(found, hub_dir)))
        except OSError as error:
            problem = not_writable(hub_dir, CACHE_VARIABLE, error)
            log.warning("each start will ask the hub for %s again: %s", model, problem)
        return found
    # OSError is the base of: no connection, no space, offline mode, and the hub's cache errors
    except (HTTPError, OSError) as error:
        raise _explained(model, hub_dir, error) from error


def _fetch_folder(model: str, info: ModelInfo, revision: str | None, hub_dir: Path, progress: ReportProgress) -> Path:
    from huggingface_hub import snapshot_download

    sizes = wanted_files({file.rfilename: file.size or 0 for file in info.siblings or []}, model)
    total_bytes = sum(sizes.values())
    _require_room(model, hub_dir, total_bytes)
    with _download_progress(hub_dir, model, total_bytes, progress):
        snapshot = snapshot_download(
            info.id, revision=revision or None, cache_dir=hub_dir, allow_patterns=sorted(sizes)
        )
    return Path(snapshot)


def _hub_files(info: ModelInfo, names: tuple[str, ...]) -> list[HubFile]:
    from huggingface_hub import hf_hub_url

    siblings = {file.rfilename: file for file in info.siblings or []}
    files = []
    for name in names:
        entry = siblings[name]
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files.append(HubFile(name, hf_hub_url(info.id, name, revision=info.sha), entry.size or 0, digest or ""))
    return files


def _fetch_gguf(files: list[HubFile], headers: Path, folder: Path, progress: ReportProgress) -> Path:
    """Download the parts of a GGUF file, each of which may be there already; returns the first."""
    header = read_gguf(headers)
    paths = [folder / part.name for part in header.parts]
    for part, path, header_bytes in zip(header.parts, paths, header.header_bytes, strict=True):
        begin_with(path, part, header_bytes)
    total_bytes, before_bytes = sum(file.byte_count for file in files), 0
    _require_room(files[0].name, folder, total_bytes - sum(map(bytes_here, paths)))
    report = at_intervals(progress)
    for file, path in zip(files, paths, strict=True):
        if not path.is_file():  # it gets this name when it is whole

            def tell(done: int, file: HubFile = file, before: int = before_bytes) -> None:
                report(StoreProgress("download", file.name, before + done, total_bytes))

            download(file, path, tell)
        before_bytes += file.byte_count
    return paths[0]


def _require_room(model: str, hub_dir: Path, byte_count: int) -> None:
    free_bytes = shutil.disk_usage(hub_dir).free
    if free_bytes < byte_count + SPARE_DISK_BYTES:
        raise StartError(
            f"{model} needs {byte_count + SPARE_DISK_BYTES} bytes on disk; {hub_dir} has {free_bytes} free.",
            cure="Free some disk space, or set NOODLE_CACHE_DIR to a folder on another disk.",
        )


def wanted_files(sizes: dict[str, int], model: str) -> dict[str, int]:
    """Choose the files to fetch from a repository's files with their bytes; raises UnsupportedModel."""
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
            f"{model} has no weights as safetensors on the hub (pickle is not loaded, because it can run any code).",
            cure="Look for a converted copy or a revision with safetensors (often refs/pr/N; name it as org/name@rev).",
        )
    if "model.safetensors" in weights and INDEX_NAME not in wanted:
        # the other files are variants (fp16, onnx exports) of the same weights
        return {name: size for name, size in wanted.items() if name not in weights or name == "model.safetensors"}
    return wanted


class _Download(msgspec.Struct, frozen=True):
    """A complete download: its folder below the hub's folder in the cache, and its files."""

    snapshot: str
    sizes: dict[str, int]
    gguf: str = ""  # which of them is the model; empty: the folder is


def _record_of(found: Path, hub_dir: Path) -> _Download:
    folder = found if found.is_dir() else found.parent
    paths = part_paths(found) if found.is_file() else [path for path in folder.iterdir() if path.is_file()]
    snapshot = str(folder.resolve().relative_to(hub_dir.resolve()))
    return _Download(
        snapshot, {path.name: path.stat().st_size for path in paths}, found.name if found.is_file() else ""
    )


def _cached_model(record_path: Path) -> Path | None:
    """The folder or GGUF file of an earlier download, if every file is there with its full size."""
    try:
        download = msgspec.json.decode(record_path.read_bytes(), type=_Download)
        folder = record_path.parent / download.snapshot
        is_complete = all((folder / name).stat().st_size == size for name, size in download.sizes.items())
    except (OSError, msgspec.DecodeError):
        return None
    return folder / download.gguf if is_complete else None


@contextmanager
def _download_progress(hub_dir: Path, model: str, total_bytes: int, progress: ReportProgress) -> Iterator[None]:
    """Report the growth of the cache: bytes on disk can be counted for each of the hub's ways to download."""
    before_bytes = _bytes_under(hub_dir)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            done_bytes = min(_bytes_under(hub_dir) - before_bytes, total_bytes)
            progress(StoreProgress("download", model, done_bytes, total_bytes))

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
        with suppress(FileNotFoundError):  # renamed from its .incomplete name in the meantime
            total += path.stat().st_size
    return total


def _explained(model: str, hub_dir: Path, error: Exception) -> StartError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # network errors have other numbers
        return not_writable(hub_dir, CACHE_VARIABLE, error)
    if isinstance(error, GatedRepoError):
        return ModelNotFound(
            f"{model} is gated: only users who have agreed to its terms may fetch it.",
            cure="Agree to them on its page on the hub, then set HF_TOKEN to your access token.",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"The hub has no such revision: {model}.", cure="Its page lists its branches, tags and commits."
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
