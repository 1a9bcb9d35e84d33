"""The headers of a hub's GGUF files without their tensors: enough to plan by, and for the tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import msgspec

from noodle.errors import UnsupportedModel
from noodle.folders import write_atomically
from noodle.model.files import DIGEST_NAME, read_config
from noodle.model.gguf import read_part
from services.coordinator.models.hub_download import HubFile, fetch_range

FIRST_BYTES = 1 << 20  # first read of a file's beginning; each further one doubles
MAXIMUM_HEADER_BYTES = 64 << 20  # of one file: ten times the largest vocabulary
SOURCE_NAME = "hub_source.json"


def fetch_headers(files: list[HubFile], folder: Path) -> Path:
    """Write each part of a model with its full size, its header and a hole for its tensors; returns the first.

    They lie in a folder of their own below `folder`. Raises UnsupportedModel for a header that is not understood, and
    as `download`.
    """
    folder = folder / PurePosixPath(files[0].name).stem
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        _fetch_header(file, folder / PurePosixPath(file.name).name)
    first = folder / PurePosixPath(files[0].name).name
    write_atomically(
        folder / DIGEST_NAME, hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest().encode()
    )
    write_atomically(folder / SOURCE_NAME, msgspec.json.encode(files))
    read_config(first)
    return first


def read_source(model: Path) -> list[HubFile] | None:
    """The hub's files of a model of which only the headers are here; None for any other model."""
    try:
        return msgspec.json.decode(model.with_name(SOURCE_NAME).read_bytes(), type=list[HubFile])
    except FileNotFoundError:
        return None


def _fetch_header(file: HubFile, path: Path) -> None:
    if path.is_file() and path.stat().st_size == file.byte_count:
        return
    byte_count = 0
    beside = path.with_name(f".{path.name}")
    beside.unlink(missing_ok=True)
    while True:
        end = min(max(FIRST_BYTES, byte_count * 2), file.byte_count)
        with beside.open("ab") as out:
            out.truncate(byte_count)
            for piece in fetch_range(file, byte_count, end):
                out.write(piece)
            out.truncate(file.byte_count)
        byte_count = end
        is_last = byte_count == file.byte_count or byte_count >= MAXIMUM_HEADER_BYTES
        try:
            if read_part(beside).byte_count <= byte_count:
                break
        except UnsupportedModel:  # perhaps because its end is not here yet
            if is_last:
                beside.replace(path)  # under its own name for the message
                read_part(path)
                raise
        if is_last:
            raise UnsupportedModel(
                f"The header of {file.name} on the hub is longer than {MAXIMUM_HEADER_BYTES} bytes.",
                cure="Name another file.",
            )
    beside.replace(path)
