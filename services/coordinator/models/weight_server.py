"""Serve the model's weights to other machines: a manifest with each tensor's digest, and files by byte range.

Digests are computed once for a model and cached.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec
from flask import Flask, Response, request

from noodle.errors import Conflict, InvalidRequest, NotFound, NotReady
from noodle.folders import write_atomically
from noodle.model.files import INDEX_NAME, digest_of_range, model_digest, pieces_of, read_tensor_entries, weight_files
from noodle.model.gguf import read_gguf
from noodle.model.tensor_entry import TensorEntry
from noodle.model.weight_manifest import MANIFEST_PATH, CompanionFile, TensorRange, WeightFile, WeightManifest
from noodle.threads import start_loop
from noodle.web.service import json_response, require_token
from services.coordinator.models.hub_download import HubFile
from services.coordinator.models.hub_headers import read_source
from services.coordinator.models.hub_tensors import pass_on

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

    The manifest is made by a thread of its own at the first request; if all stages have the model itself, as under
    `noodle up`, there is none.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._model: tuple[Path, str] | None = None  # path and name
        self._hub_files: dict[str, HubFile] = {}  # of a model of which only the headers are here
        self._files: dict[str, Path] = {}  # as `served_files`, this and the next once the manifest is made
        self._stamps: dict[str, tuple[int, int]] = {}
        self._manifest: WeightManifest | None = None
        self._is_started = False
        self._progress = 0.0
        self._lock = threading.Lock()
        self._is_ready = threading.Event()

    def serve(self, model: Path, model_name: str) -> None:
        with self._lock:
            self._model = (model, model_name)

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
        """A file of the model; raises NotFound for other names, Conflict if it is not what the manifest describes."""
        self.manifest()
        path = self._files.get(name)
        if path is None:
            raise NotFound(f"The model has no file {name[:200]!r}.", cure=f"GET {MANIFEST_PATH} names them.")
        if _stamp(path) != self._stamps[name]:
            raise Conflict(
                f"{path} on the coordinator's machine has changed since it was opened.",
                cure="Restart the coordinator, which opens it again; the stages follow.",
            )
        return path

    def pieces_of(self, name: str, path: Path, first: int, end: int) -> Iterator[bytes]:
        """The bytes [first, end) of a file that `path_of` found, passed on from the hub if they are not here."""
        hub_file = self._hub_files.get(name)
        if hub_file is None or end <= next(file.header_bytes for file in self.manifest().files if file.name == name):
            return pieces_of(path, first, end - first)
        return pass_on(hub_file, first, end)

    def _prepare(self, model: Path, model_name: str) -> None:
        files, digest = served_files(model), model_digest(model)
        stamps = {name: _stamp(path) for name, path in files.items()}
        self._files, self._stamps = files, stamps
        make = partial(make_manifest, model, model_name=model_name, digest=digest, files=files)
        if (hub_files := read_source(model)) is not None:
            self._hub_files = dict(zip(files, hub_files, strict=True))
            manifest = make(digest_of=lambda _entry: "")  # the hub has digests of whole files alone
        elif (found := self._cached_manifest(digest, stamps)) is not None:
            manifest = msgspec.structs.replace(found, model_name=model_name)
        else:
            manifest = make(digest_of=self._digest_with_progress(model))
            path = self._cache_path(digest)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, msgspec.json.encode(_CachedManifest(stamps, manifest)))
            except OSError as error:
                log.warning("digests are not cached, the next start computes them again: %s", error)
        self._manifest = manifest
        self._is_ready.set()

    def _cached_manifest(self, digest: str, stamps: dict[str, tuple[int, int]]) -> WeightManifest | None:
        """The manifest from an earlier start, if no file has changed since."""
        try:
            cached = msgspec.json.decode(self._cache_path(digest).read_bytes(), type=_CachedManifest)
        except (OSError, msgspec.MsgspecError):  # absent or damaged: it can be made again
            return None
        return cached.manifest if cached.stamps == stamps else None

    def _cache_path(self, digest: str) -> Path:
        return self._cache_dir / DIGESTS_FOLDER / f"{digest}.json"

    def _digest_with_progress(self, model: Path) -> Callable[[TensorEntry], str]:
        total_bytes = max(1, sum(entry.byte_count for entry in read_tensor_entries(model).values()))
        done_bytes = 0

        def digest_of(entry: TensorEntry) -> str:
            nonlocal done_bytes
            digest = digest_of_range(entry.file, entry.first_byte, entry.byte_count)
            done_bytes += entry.byte_count
            self._progress = done_bytes / total_bytes
            return digest

        return digest_of


def make_manifest(
    model: Path, *, model_name: str, digest: str, files: Mapping[str, Path], digest_of: Callable[[TensorEntry], str]
) -> WeightManifest:
    """Describe a model's tensors and `files`; raises ModelNotFound or UnsupportedModel if it is incomplete."""
    entries = read_tensor_entries(model)
    name_of = {path: name for name, path in files.items()}
    # in disk order, so that each file is read once from start to end
    in_order = sorted(entries.items(), key=lambda item: (item[1].file, item[1].first_byte))
    is_gguf = model.is_file()
    return WeightManifest(
        model_name=model_name,
        model_digest=digest,
        companions=[
            CompanionFile(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for name, path in files.items()
            if name in COMPANION_NAMES
        ],
        files=[
            WeightFile(name, path.stat().st_size, header_bytes, digest_of_range(path, 0, header_bytes))
            for name, path, header_bytes in _headers(model, files)
        ],
        tensors=[
            TensorRange(name, name_of[entry.file], entry.first_byte, entry.byte_count, digest_of(entry))
            for name, entry in in_order
        ],
        gguf=next(iter(files)) if is_gguf else None,
    )


def _headers(model: Path, files: Mapping[str, Path]) -> Iterator[tuple[str, Path, int]]:
    """Yield name, path and header bytes of each file with tensors."""
    if model.is_file():
        for (name, path), header_bytes in zip(files.items(), read_gguf(model).header_bytes, strict=True):
            yield name, path, header_bytes
        return
    for name, path in files.items():
        if name not in COMPANION_NAMES:
            with path.open("rb") as file:
                yield name, path, 8 + int.from_bytes(file.read(8), "little")


def served_files(model: Path) -> dict[str, Path]:
    """The files of a model by the names under which other machines fetch them; a GGUF file's own may be any."""
    if model.is_file():
        parts = read_gguf(model).parts
        names = [f"model-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)]
        return dict(zip(names if len(parts) > 1 else ["model.gguf"], parts, strict=True))
    companions = [model / name for name in COMPANION_NAMES if (model / name).is_file()]
    return {path.name: path for path in (*companions, *weight_files(model))}


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
        response = Response(store.pieces_of(name, path, first, end), 206, mimetype="application/octet-stream")
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


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time in nanoseconds; zeros for a file that is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
