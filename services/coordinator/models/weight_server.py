"""The weights that this coordinator serves: a manifest with every tensor's digest, and files by byte range (design D7).

Digests are computed once for a model and kept in the cache; knows no layers, and hands out nothing but the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from flask import Flask, Response, request

from noodle.errors import InvalidRequest, NotFound, NotReady
from noodle.model.files import INDEX_NAME, digest_of_range, model_digest, read_tensor_entries
from noodle.model.weight_manifest import MANIFEST_PATH, CompanionFile, TensorRange, WeightFile, WeightManifest
from noodle.threads import start_loop
from noodle.web.service import json_response, require_token

log = logging.getLogger(__name__)

COMPANION_NAMES = ("config.json", "generation_config.json", "tokenizer.json", INDEX_NAME)
PIECE_BYTES = 1 << 20  # read and sent at once
KEPT_FOLDER = "digests"
MANIFEST_WAIT_SECONDS = 10.0  # for the digests, until who asks is told to come again


class _KeptManifest(msgspec.Struct, frozen=True):
    """A manifest, and the size and time of change of each file that it was made from."""

    stamps: dict[str, tuple[int, int]]
    manifest: WeightManifest


class WeightStore:
    """The weights of one model; its manifest is made when somebody first asks, in a thread of its own.

    Where all stages have the model's folder, as under `noodle up`, nobody ever does.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._model: tuple[Path, str] | None = None  # folder and name
        self._names: frozenset[str] = frozenset()
        self._manifest: WeightManifest | None = None
        self._is_asked = False
        self._done = 0.0
        self._lock = threading.Lock()
        self._is_made = threading.Event()

    def serve(self, folder: Path, model_name: str) -> None:
        """This is the model from now on."""
        with self._lock:
            self._model = (folder, model_name)

    def manifest(self) -> WeightManifest:
        """Of the model that is served; raises NotReady with progress until it is known."""
        with self._lock:
            if self._manifest is not None:
                return self._manifest
            if self._model is None:
                raise NotReady("The coordinator has not got the model itself yet.", retry_after_seconds=2)
            if not self._is_asked:
                self._is_asked = True
                start_loop("digests", self._prepare, "coordinator")
        if self._is_made.wait(MANIFEST_WAIT_SECONDS) and self._manifest is not None:
            return self._manifest
        raise NotReady(
            f"The digests of the model's weights are being computed ({self._done:.0%}).", retry_after_seconds=2
        )

    def _prepare(self) -> None:
        """Compute the digests of the model, or find them in the cache."""
        assert self._model is not None  # noqa: S101  # `manifest` looked before it started this thread
        folder, model_name = self._model
        manifest = kept_manifest(self._cache_dir, folder) or self._computed(folder, model_name)
        manifest = msgspec.structs.replace(manifest, model_name=model_name)
        with self._lock:
            self._manifest = manifest
            self._names = frozenset(
                [*(companion.name for companion in manifest.companions), *(file.name for file in manifest.files)]
            )
        self._is_made.set()

    def path_of(self, name: str) -> Path:
        """A file of the model; raises NotFound for every other name."""
        self.manifest()
        if name not in self._names:
            raise NotFound(f"The model has no file {name[:200]!r}.", cure=f"GET {MANIFEST_PATH} names them.")
        assert self._model is not None  # noqa: S101  # it has a manifest
        return self._model[0] / name

    def _computed(self, folder: Path, model_name: str) -> WeightManifest:
        stamps = _stamps(folder)
        manifest = make_manifest(folder, model_name, self._say)
        kept = self._cache_dir / KEPT_FOLDER / f"{manifest.model_digest}.json"
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            beside = kept.with_suffix(f".{os.getpid()}.tmp")
            beside.write_bytes(msgspec.json.encode(_KeptManifest(stamps, manifest)))
            beside.replace(kept)
        except OSError as error:
            log.warning("digests are not kept, the next start computes them again: %s", error)
        return manifest

    def _say(self, done: float) -> None:
        self._done = done


def make_manifest(folder: Path, model_name: str, progress: Callable[[float], None]) -> WeightManifest:
    """Read every byte of a model folder once; raises ModelNotFound or UnsupportedModel for one that is not whole."""
    entries = read_tensor_entries(folder)
    paths = sorted({entry.file for entry in entries.values()})
    total_bytes = sum(entry.byte_count for entry in entries.values())
    done_bytes = 0
    tensors: list[TensorRange] = []
    # in the order of the disk, so that each file is read once from its start to its end
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
    files = [_weight_file(path) for path in paths]
    return WeightManifest(model_name, model_digest(folder), companions, files, tensors)


def kept_manifest(cache_dir: Path, folder: Path) -> WeightManifest | None:
    """The manifest from an earlier start, when no file has changed since."""
    path = cache_dir / KEPT_FOLDER / f"{model_digest(folder)}.json"
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_KeptManifest)
    except (OSError, msgspec.MsgspecError):  # not there, or damaged: it can be made again
        return None
    return kept.manifest if kept.stamps == _stamps(folder) else None


def install_weight_routes(app: Flask, store: WeightStore, cluster_token: str) -> None:
    """`GET /weights` and `GET /weights/files/<name>` with a Range, for whoever has the cluster token."""

    @app.get("/weights")
    def weights() -> Response:
        require_token(cluster_token)
        return json_response(store.manifest())

    @app.get("/weights/files/<name>")
    def weight_file(name: str) -> Response:
        require_token(cluster_token)
        path = store.path_of(name)
        byte_count = path.stat().st_size
        first, end = _asked_range(byte_count)
        response = Response(_pieces(path, first, end), 206, mimetype="application/octet-stream")
        response.headers["Content-Range"] = f"bytes {first}-{end - 1}/{byte_count}"
        response.headers["Content-Length"] = str(end - first)
        return response


def _asked_range(byte_count: int) -> tuple[int, int]:
    asked = request.range
    if asked is None or asked.units != "bytes" or len(asked.ranges) != 1:
        raise InvalidRequest("One Range of bytes is needed.", cure="Send Range: bytes=FIRST-LAST.", param="Range")
    span = asked.range_for_length(byte_count)
    if span is None:
        raise InvalidRequest(f"The range is outside the file's {byte_count} bytes.", param="Range")
    return span[0], span[1]


def _pieces(path: Path, first: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        left = end - first
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece


def _weight_file(path: Path) -> WeightFile:
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    return WeightFile(path.name, path.stat().st_size, header_bytes, digest_of_range(path, 0, header_bytes))


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    names = sorted({entry.file.name for entry in read_tensor_entries(folder).values()})
    present = [name for name in (*COMPANION_NAMES, *names) if (folder / name).is_file()]
    stats = {name: (folder / name).stat() for name in present}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
