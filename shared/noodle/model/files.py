"""Reads the config and the headers of a model, and digests of its files.

A model is a folder with config.json and safetensors, or a GGUF file (of a split one its first part). Planner and
stages compare `model_digest`, so that all stages compute with the same weights.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.gguf import LFS_CURE, LFS_MAGIC, read_gguf
from noodle.model.gguf_config import gguf_config
from noodle.model.tensor_entry import TensorEntry, first_overlap

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DIGEST_NAME = "model.digest"  # the digest of a model with holes (weight_cache.py)
PIECE_BYTES = 1 << 20  # bytes of one read
HEADER_BYTES_CAP = 100 << 20  # largest safetensors header, as in safetensors
CONFIG_BYTES_CAP = 16 << 20  # largest config.json
SAMPLED_TENSORS = 256  # tensors that a model digest samples, also for 20,000 tensors of experts on a slow disk
TENSOR_SAMPLE_BYTES = 1024  # bytes of each sampled tensor
# of the program that saved the folder, not of the model
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def read_config(model: Path) -> dict[str, Any]:
    """Read config.json, or what it would say from a GGUF file's header; raises ModelNotFound or UnsupportedModel."""
    if model.is_file():
        return gguf_config(read_gguf(model))
    path = model / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_CAP:
            raise UnsupportedModel(f"{path} is larger than {CONFIG_BYTES_CAP} bytes.", cure="Fetch the model again.")
        content = path.read_bytes()
    except OSError as error:
        raise ModelNotFound(
            f"{path} cannot be read ({error.strerror}).", cure="Name a folder with config.json and *.safetensors."
        ) from error
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(path, content, f"not a JSON object ({error})") from error


def _not_json(path: Path, content: bytes, what: str) -> UnsupportedModel:
    if content.startswith(LFS_MAGIC):
        return UnsupportedModel(f"{path} is a Git LFS pointer, not the file itself.", cure=LFS_CURE)
    return UnsupportedModel(f"{path} is {what}.", cure="Fetch the model again.")


def names_a_path(model: str) -> bool:
    """Whether NOODLE_MODEL is a path on this machine, and not a name or hub id."""
    return model.startswith(("/", "./", "../", "~"))


def read_index(folder: Path) -> dict[str, str] | None:
    """Names of the weight files by tensor, as the folder's index has them; None without an index."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    try:
        content = index.read_bytes()
    except OSError as error:
        raise ModelNotFound(f"{index} cannot be read ({error.strerror}).", cure="Let this user read it.") from error
    try:
        weight_map = msgspec.json.decode(content, type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(index, content, f"not a weight index ({error})") from error
    names = set(weight_map.values())  # a few, each of thousands of tensors
    outside = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    if outside:
        raise UnsupportedModel(
            f"{index} names {outside[0]!r}, which is not a safetensors file beside it.",
            cure="Fetch the model's safetensors files again.",
        )
    return weight_map


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, from its index if there is one; some may be missing."""
    weight_map = read_index(folder)
    if weight_map is not None:
        return tuple(folder / name for name in sorted(set(weight_map.values())))
    single = folder / SINGLE_NAME
    return (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))


def missing_weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of missing weight files; `*.safetensors` when there are none at all."""
    return _missing(weight_files(folder))


def _missing(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(path.name for path in files if not path.is_file()) if files else ("*.safetensors",)


def read_tensor_entries(model: Path) -> Mapping[str, TensorEntry]:
    """Return every tensor by its name in the files; raises ModelNotFound or UnsupportedModel."""
    if model.is_file():
        return read_gguf(model).entries
    folder, files = model, weight_files(model)
    if missing := _missing(files):
        raise ModelNotFound(
            f"{folder} lacks {len(missing)} of its weight files, the first is {missing[0]}.",
            cure="Fetch the model's *.safetensors files again.",
        )
    entries: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in entries:
                raise UnsupportedModel(
                    f"{folder} has the tensor {name} twice ({entries[name].file.name} and {path.name}).",
                    cure=f"Remove the wrong copy, or add {INDEX_NAME}.",
                )
            entries[name] = entry
    return entries


def model_digest(model: Path) -> str:
    """Digest of config and weights, the same on every machine however the weights are distributed over files.

    It covers the values of the config, the name, dtype and shape of every tensor, and a kilobyte from the middle of up
    to 256 tensors chosen evenly by name. So it tells models, dtypes and fine-tunes apart, but misses a flipped bit
    outside the samples, a change to a few tensors that were not chosen, and the tokenizer.
    """
    known = model.with_name(DIGEST_NAME) if model.is_file() else model / DIGEST_NAME
    if known.is_file():
        return known.read_text(encoding="ascii").strip()
    config = {key: value for key, value in read_config(model).items() if key not in IGNORED_CONFIG_KEYS}
    digest = hashlib.sha256(msgspec.json.encode(config, order="deterministic"))
    entries = sorted(read_tensor_entries(model).items())
    for name, entry in entries:
        digest.update(f"\0{name}\0{entry.dtype}\0{list(entry.shape)}".encode())
    chosen_count = min(SAMPLED_TENSORS, len(entries))
    for number in range(chosen_count):
        _, entry = entries[number * len(entries) // chosen_count]
        start = entry.first_byte + max(0, (entry.byte_count - TENSOR_SAMPLE_BYTES) // 2)
        with entry.file.open("rb") as file:
            digest.update(os.pread(file.fileno(), min(TENSOR_SAMPLE_BYTES, entry.byte_count), start))
    return digest.hexdigest()


def pieces_of(path: Path, first_byte: int, byte_count: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first_byte)
        left = byte_count
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece


def digest_of_range(path: Path, first_byte: int, byte_count: int) -> str:
    digest = hashlib.sha256()
    for piece in pieces_of(path, first_byte, byte_count):
        digest.update(piece)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; raises ModelNotFound or, for a damaged file, UnsupportedModel."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == LFS_MAGIC[:8]:
                raise UnsupportedModel(f"{path} is a Git LFS pointer, not the file itself.", cure=LFS_CURE)
            header_bytes = int.from_bytes(start, "little")
            if file_bytes < 8 or header_bytes > min(HEADER_BYTES_CAP, file_bytes - 8):
                raise _broken(path, "its header is longer than the file")
            encoded = file.read(header_bytes)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read ({error.strerror}).", cure="Fetch the model again.") from error
    try:
        raw = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        header = {name: msgspec.json.decode(value, type=_HeaderEntry) for name, value in raw.items()}
    except (msgspec.DecodeError, RecursionError) as error:
        raise _broken(path, f"its header is malformed ({error})") from error
    data_start = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, item in header.items():
        first, end = item.data_offsets
        if item.dtype not in DTYPE_BITS:
            raise _broken(path, f"{name} has the unknown dtype {item.dtype[:20]!r}")
        if min(item.shape, default=0) < 0 or math.prod(item.shape) * DTYPE_BITS[item.dtype] != (end - first) * 8:
            raise _broken(path, f"{name} does not have the bytes of its shape")
        if first < 0 or data_start + end > file_bytes:
            raise _broken(path, f"{name} lies beyond the end of the file")
        entries[name] = TensorEntry(path, item.dtype, tuple(item.shape), data_start + first, end - first)
    if overlapping := first_overlap(entries):
        raise _broken(path, "tensors {} and {} overlap".format(*overlapping))
    return entries


def _broken(path: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} is not a complete safetensors file: {why}.", cure="It may be cut short: fetch or convert it again."
    )
