"""Serve the model's weights to other machines: a manifest with each tensor's digest, and files by byte range.

Digests are computed once for a model and cached.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from flask import Flask, Response, request

from noodle.errors import InvalidRequest, NotFound, NotReady
from noodle.folders import write_atomically
from noodle.model.files import INDEX_NAME, digest_of_range, model_digest, pieces_of, read_tensor_entries
from noodle.model.weight_manifest import MANIFEST_PATH, CompanionFile, TensorRange, WeightFile, WeightManifest
from noodle.threads import start_loop
from noodle.web.service import json_response, require_token

log = logging.getLogger(__name__)

COMPANION_NAMES = ("config.json", "generation_config.json", "tokenizer.json", INDEX_NAME)
DIGESTS_FOLDER = "digests"
MANIFEST_WAIT_SECONDS = 10.0  # then the client is asked to retry


class _CachedManifest(msgspec.Struct, frozen=True):
    """A manifest, and the size and modification time of each of its files."""

    stamps: dict[str, tuple[int, int]]
    manifest: WeightManifest


class WeightStore:
    """The weights of one model.

    The manifest is made by a thread of its own at the first request; if all stages have the model's folder, as under
    `noodle up`, there is none.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._model: tuple[Path, str] | None = None  # folder and name
        self._manifest: WeightManifest | None = None
        self._is_started = False
        self._progress = 0.0
        self._lock = threading.Lock()
        self._is_ready = threading.Event()

    def serve(self, folder: Path, model_name: str) -> None:
        with self._lock:
            self._model = (folder, model_name)

    def manifest(self) -> WeightManifest:
        """The model's manifest; raises NotReady with progress until it is made."""
        with self._lock:
            if self._model is None:
                raise NotReady("The coordinator does not have the model itself yet.", retry_after_seconds=2)
            if not self._is_started:
                self._is_started = True
                start_loop("digests", partial(self._prepare, *self._model), "coordinator")
        if self._is_ready.wait(MANIFEST_WAIT_SECONDS) and self._manifest is not None:
            return self._manifest
        raise NotReady(
            f"The digests of the model's weights are being computed ({self._progress:.0%}).", retry_after_seconds=2
        )

    def path_of(self, name: str) -> Path:
        """A file of the model; raises NotFound for other names."""
        manifest = self.manifest()
        names = {*(companion.name for companion in manifest.companions), *(file.name for file in manifest.files)}
        if self._model is None or name not in names:
            raise NotFound(f"The model has no file {name[:200]!r}.", cure=f"GET {MANIFEST_PATH} names them.")
        return self._model[0] / name

    def _prepare(self, folder: Path, model_name: str) -> None:
        manifest = cached_manifest(self._cache_dir, folder)
        if manifest is None:
            stamps = _stamps(folder)
            manifest = make_manifest(folder, model_name, self._set_progress)
            path = self._cache_dir / DIGESTS_FOLDER / f"{manifest.model_digest}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, msgspec.json.encode(_CachedManifest(stamps, manifest)))
            except OSError as error:
                log.warning("digests are not cached, the next start computes them again: %s", error)
        self._manifest = msgspec.structs.replace(manifest, model_name=model_name)
        self._is_ready.set()

    def _set_progress(self, progress: float) -> None:
        self._progress = progress


def make_manifest(folder: Path, model_name: str, progress: Callable[[float], None]) -> WeightManifest:
    """Read every byte of a model folder once; raises ModelNotFound or UnsupportedModel if it is incomplete."""
    entries = read_tensor_entries(folder)
    paths = sorted({entry.file for entry in entries.values()})
    total_bytes = sum(entry.byte_count for entry in entries.values())
    done_bytes = 0
    tensors: list[TensorRange] = []
    # in disk order, so that each file is read once from start to end
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].first_byte)):
        digest = digest_of_range(entry.file, entry.first_byte, entry.byte_count)
        tensors.append(TensorRange(name, entry.file.name, entry.first_byte, entry.byte_count, digest))
        done_bytes += entry.byte_count
        progress(done_bytes / max(1, total_bytes))
    companions = [
        CompanionFile(name, (folder / name).stat().st_size, hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name in COMPANION_NAMES
        if (folder / name).is_file()
    ]
    return WeightManifest(model_name, model_digest(folder), companions, [_weight_file(path) for path in paths], tensors)


def cached_manifest(cache_dir: Path, folder: Path) -> WeightManifest | None:
    """The manifest from an earlier start, if no file has changed since."""
    path = cache_dir / DIGESTS_FOLDER / f"{model_digest(folder)}.json"
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_CachedManifest)
    except (OSError, msgspec.MsgspecError):  # absent or damaged: it can be made again
        return None
    return cached.manifest if cached.stamps == _stamps(folder) else None


def install_weight_routes(app: Flask, store: WeightStore, cluster_token: str) -> None:
    """`GET /weights` and `GET /weights/files/<name>` with a Range; both need the cluster token."""

    @app.get("/weights")
    def weights() -> Response:
        require_token(cluster_token)
        return json_response(store.manifest())

    @app.get("/weights/files/<name>")
    def weight_file(name: str) -> Response:
        require_token(cluster_token)
        path = store.path_of(name)
        byte_count = path.stat().st_size
        first, end = _requested_range(byte_count)
        response = Response(pieces_of(path, first, end - first), 206, mimetype="application/octet-stream")
        response.headers["Content-Range"] = f"bytes {first}-{end - 1}/{byte_count}"
        response.headers["Content-Length"] = str(end - first)
        return response


def _requested_range(byte_count: int) -> tuple[int, int]:
    requested = request.range
    if requested is None or requested.units != "bytes" or len(requested.ranges) != 1:
        raise InvalidRequest("One Range of bytes is needed.", cure="Send Range: bytes=FIRST-LAST.", param="Range")
    span = requested.range_for_length(byte_count)
    if span is None:
        raise InvalidRequest(f"The range is outside the file's {byte_count} bytes.", param="Range")
    return span[0], span[1]


def _weight_file(path: Path) -> WeightFile:
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    return WeightFile(path.name, path.stat().st_size, header_bytes, digest_of_range(path, 0, header_bytes))


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    names = sorted({entry.file.name for entry in read_tensor_entries(folder).values()})
    present = [name for name in (*COMPANION_NAMES, *names) if (folder / name).is_file()]
    stats = {name: (folder / name).stat() for name in present}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
