"""Reads what a model's folder says of itself without reading its weights; knows safetensors headers, no layers.

Planner and stage compare `model_digest`, so that no two stages ever compute with different weights.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from noodle.errors import ModelNotFound, UnsupportedModel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DIGEST_NAME = "model.digest"  # in a folder with holes (weight_cache.py), which can not be digested itself
PIECE_BYTES = 1 << 20
HEADER_BYTES_CAP = 100 << 20  # safetensors' own limit
CONFIG_BYTES_CAP = 16 << 20
SAMPLED_TENSORS = 256  # bounds the digest to some hundred reads, also for 20,000 tensors of experts on a slow disk
TENSOR_SAMPLE_BYTES = 1024
WHOLE_DIGEST_BYTES = 16 << 20  # files up to this size are digested whole
FILE_SAMPLES = 64
FILE_SAMPLE_BYTES = 64 << 10
# written by whatever saved the folder; they say nothing of the model
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    first_byte: int  # from the start of the file
    byte_count: int

    @property
    def item_count(self) -> int:
        """Weights in the tensor."""
        return math.prod(self.shape)


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict; raises ModelNotFound or UnsupportedModel."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_CAP:
            raise UnsupportedModel(f"{path} is larger than {CONFIG_BYTES_CAP} bytes.", cure="Fetch the model again.")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelNotFound(
            f"{path} can not be read ({error.strerror}).",
            cure="Name a folder that holds config.json and *.safetensors.",
        ) from error
    except msgspec.DecodeError as error:
        raise UnsupportedModel(f"{path} is not a JSON object ({error}).", cure="Fetch the model again.") from error


def names_a_path(model: str) -> bool:
    """Whether NOODLE_MODEL means a file or folder of this machine, and not a name or hub id."""
    return model.startswith(("/", "./", "../", "~"))


def read_index(folder: Path) -> dict[str, str] | None:
    """Names of the weight files by tensor, as the folder's index has them; None without an index."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise UnsupportedModel(f"{index} is not a weight index ({error}).", cure="Fetch the model again.") from error
    outside = sorted(
        name for name in weight_map.values() if Path(name).name != name or not name.endswith(".safetensors")
    )
    if outside:
        raise UnsupportedModel(
            f"{index} names {outside[0]!r}, which is not a safetensors file beside it.",
            cure="Fetch the model's safetensors files again.",
        )
    return weight_map


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make the model, as its index says or as there are; some may be missing."""
    weight_map = read_index(folder)
    if weight_map is not None:
        return tuple(folder / name for name in sorted(set(weight_map.values())))
    single = folder / SINGLE_NAME
    return (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))


def missing_weight_files(folder: Path) -> tuple[str, ...]:
    """Names of weight files that are not there; `*.safetensors` when there is none at all."""
    files = weight_files(folder)
    return tuple(path.name for path in files if not path.is_file()) if files else ("*.safetensors",)


def read_tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model by name, from the headers alone; raises ModelNotFound or UnsupportedModel."""
    missing = missing_weight_files(folder)
    if missing:
        raise ModelNotFound(
            f"{folder} lacks {len(missing)} of its weight files, the first is {missing[0]}.",
            cure="Fetch the model's *.safetensors files again.",
        )
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if name in entries:
                raise UnsupportedModel(
                    f"{folder} holds the tensor {name} twice ({entries[name].file.name} and {path.name}).",
                    cure=f"Remove the copy that is not meant, or add {INDEX_NAME}.",
                )
            entries[name] = entry
    return entries


def model_digest(folder: Path) -> str:
    """Digest of config and weights, the same on every machine and for every way of cutting the weights into files.

    It covers the config's values, every tensor's name, dtype and shape, and a kilobyte from the middle of up to 256
    tensors chosen evenly by name. So it tells models, dtypes and fine-tunes apart; it does not see a flipped bit
    outside the samples, nor a change to only a few tensors that were not chosen, nor the tokenizer.
    """
    if (folder / DIGEST_NAME).is_file():
        return (folder / DIGEST_NAME).read_text(encoding="ascii").strip()
    config = {key: value for key, value in read_config(folder).items() if key not in IGNORED_CONFIG_KEYS}
    digest = hashlib.sha256(msgspec.json.encode(config, order="deterministic"))
    entries = sorted(read_tensor_entries(folder).items())
    for name, entry in entries:
        digest.update(f"\0{name}\0{entry.dtype}\0{list(entry.shape)}".encode())
    chosen_count = min(SAMPLED_TENSORS, len(entries))
    for number in range(chosen_count):
        _, entry = entries[number * len(entries) // chosen_count]
        start = entry.first_byte + max(0, (entry.byte_count - TENSOR_SAMPLE_BYTES) // 2)
        with entry.file.open("rb") as file:
            digest.update(os.pread(file.fileno(), min(TENSOR_SAMPLE_BYTES, entry.byte_count), start))
    return digest.hexdigest()


def digest_of_range(path: Path, first_byte: int, byte_count: int) -> str:
    """sha256 of a part of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(first_byte)
        left = byte_count
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """sha256 of a file's size and content: whole up to 16 MB, above that 64 samples of 64 kB spread over it."""
    byte_count = path.stat().st_size
    digest = hashlib.sha256(str(byte_count).encode())
    with path.open("rb") as file:
        if byte_count <= WHOLE_DIGEST_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(FILE_SAMPLES):
            file.seek(number * (byte_count - FILE_SAMPLE_BYTES) // (FILE_SAMPLES - 1))
            digest.update(file.read(FILE_SAMPLE_BYTES))
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; raises ModelNotFound or, for a damaged file, UnsupportedModel."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(HEADER_BYTES_CAP, file_bytes - 8):
                raise _broken(path, "its header is longer than the file")
            encoded = file.read(header_bytes)
    except OSError as error:
        raise ModelNotFound(f"{path} can not be read ({error.strerror}).", cure="Fetch the model again.") from error
    try:
        raw = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        header = {name: msgspec.json.decode(value, type=_HeaderEntry) for name, value in raw.items()}
    except msgspec.DecodeError as error:
        raise _broken(path, f"its header is not what safetensors writes ({error})") from error
    data_start = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, item in header.items():
        first, end = item.data_offsets
        if item.dtype not in DTYPE_BITS:
            raise _broken(path, f"{name} is of the unknown dtype {item.dtype[:20]!r}")
        if min(item.shape, default=0) < 0 or math.prod(item.shape) * DTYPE_BITS[item.dtype] != (end - first) * 8:
            raise _broken(path, f"{name} does not have as many bytes as its shape says")
        if first < 0 or data_start + end > file_bytes:
            raise _broken(path, f"{name} lies beyond the end of the file")
        entries[name] = TensorEntry(path, item.dtype, tuple(item.shape), data_start + first, end - first)
    return entries


def _broken(path: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} is not a whole safetensors file: {why}.", cure="It may be cut short: fetch or convert it again."
    )
