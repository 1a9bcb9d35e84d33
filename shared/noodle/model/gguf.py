"""Reads the header of a GGUF file, or of all parts of a split one; tensors are found and not read.

Every count and size is checked against the file's length before anything is allocated for it.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.ggml_types import GGML_TYPE_BY_NUMBER
from noodle.model.tensor_entry import TensorEntry, first_overlap

MAGIC = b"GGUF"
LFS_MAGIC = b"version https://git-lfs"
LFS_CURE = "Run `git lfs pull` in its folder."
VERSIONS = (2, 3)  # the same layout; 1 has shorter counts and is written by no program of the last years
READ_BYTES = 1 << 20  # first read of a header; each further one doubles
MAXIMUM_HEADER_BYTES = 512 << 20  # header of one file
MAXIMUM_KEYS = 1 << 16
MAXIMUM_TENSORS = 1 << 20
MAXIMUM_NAME_BYTES = 1024  # of a key or a tensor
MAXIMUM_TEXT_BYTES = 16 << 20  # of one string: a chat template is the longest
MAXIMUM_DIMENSIONS = 4
MAXIMUM_SIZE = 1 << 40  # items of one dimension
MAXIMUM_PARTS = 10_000
DEFAULT_ALIGNMENT = 32
SHORT_ARRAY_ITEMS = 1024  # longer ones are read on demand
FETCH_CURE = "It may be cut short or damaged: fetch it again."
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

STRING, ARRAY, BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # as struct


@dataclass(frozen=True, slots=True)
class GgufArray:
    """A long array of the metadata, which is read on demand."""

    path: Path
    item_type: int
    count: int
    first_byte: int
    byte_count: int

    def values(self) -> list[Any]:
        with self.path.open("rb") as file:
            file.seek(self.first_byte)
            data = file.read(self.byte_count)
        if len(data) < self.byte_count:
            raise UnsupportedModel(f"{self.path} was cut short while it was read.", cure=FETCH_CURE)
        return _items(data, 0, self.item_type, self.count)


@dataclass(frozen=True)
class GgufFile:
    """The metadata and the tensors of a model; `parts` are its files in order."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    parts: tuple[Path, ...]
    header_bytes: tuple[int, ...]  # of each part, up to its first tensor

    def array(self, key: str) -> list[Any] | None:
        """An array of the metadata as a list; None if there is no such array."""
        value = self.metadata.get(key)
        if isinstance(value, GgufArray):
            return value.values()
        return value if isinstance(value, list) else None

    def count_of(self, key: str) -> int | None:
        """Number of items of an array; None if there is no such array."""
        value = self.metadata.get(key)
        return value.count if isinstance(value, GgufArray) else len(value) if isinstance(value, list) else None


def first_unread(names: Collection[str], read: Collection[str], layers: range, repetitions: Collection[str]) -> str:
    """The first tensor of these layers that is not among those read; empty if there is none but `repetitions`.

    Repetitions are parts of names after the layer's number: tensors that repeat others, or what the header says.
    """
    prefixes = tuple(f"blk.{number}." for number in layers)
    unread = (name for name in sorted(set(names).difference(read)) if name.startswith(prefixes))
    return next((name for name in unread if name.split(".")[2] not in repetitions), "")


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the split file that `path` is the first part of, or `path` alone.

    Raises UnsupportedModel if it is a later part.
    """
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if number != 1:
        first = f"{match['stem']}-00001-of-{match['count']}.gguf"
        raise UnsupportedModel(
            f"{path} is part {number} of {count} of a split model.",
            cure=f"Name its first part, {path.with_name(first)}.",
        )
    if not 1 <= count <= MAXIMUM_PARTS:
        raise UnsupportedModel(f"{path} is named as one of {count} parts.", cure="Rename it to what it is.")
    return tuple(path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1))


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a model's file or of all its parts; a header that did not change is kept.

    Raises ModelNotFound for a missing file or part, UnsupportedModel for one that is damaged or not understood.
    """
    parts = part_paths(path)
    stamps = []
    for part in parts:
        try:
            stat = part.stat()
        except OSError as error:
            which = f"part {parts.index(part) + 1} of {len(parts)} of the model, " if len(parts) > 1 else ""
            raise ModelNotFound(
                f"{which}{part} cannot be read ({error.strerror}).",
                cure="Name an existing .gguf file with all its parts.",
            ) from error
        stamps.append((stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return _read(path, parts, tuple(stamps))


@functools.lru_cache(maxsize=4)
def _read(path: Path, parts: tuple[Path, ...], _stamps: tuple[tuple[int, int, int], ...]) -> GgufFile:
    headers = [read_part(part) for part in parts]
    metadata = headers[0].metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _broken(path, "it names no architecture (general.architecture)")
    _check_split(path, parts, headers)
    entries: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.entries.items():
            if name in entries:
                raise _broken(entry.file, f"it holds the tensor {name}, which {entries[name].file.name} holds too")
            entries[name] = entry
    announced = metadata.get("split.tensors.count")
    if len(parts) > 1 and isinstance(announced, int) and announced != len(entries):
        raise _broken(path, f"its parts hold {len(entries)} tensors, but {announced} are announced")
    if not entries:
        raise _broken(path, "it holds no tensors")
    return GgufFile(
        path=path,
        architecture=architecture,
        metadata=metadata,
        entries=entries,
        parts=parts,
        header_bytes=tuple(header.byte_count for header in headers),
    )


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors of one file, which ends at `byte_count`."""

    metadata: dict[str, Any]
    entries: dict[str, TensorEntry]
    byte_count: int


def _check_split(path: Path, parts: tuple[Path, ...], headers: list[GgufHeader]) -> None:
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        count = header.metadata.get("split.count", 1)
        if count in (0, 1) and len(parts) == 1:
            continue
        if count != len(parts):
            raise UnsupportedModel(
                f"{part} says that the model has {count} parts, and its name says {len(parts)}.",
                cure=f"Name the files as they were published, {path.stem.partition('-0000')[0]}-00001-of-NNNNN.gguf.",
            )
        if header.metadata.get("split.no") != number:
            raise UnsupportedModel(
                f"{part} says that it is part {header.metadata.get('split.no')} (counted from 0), and its name says "
                f"{number + 1}.",
                cure="Name the files as they were published.",
            )


def read_part(path: Path) -> GgufHeader:
    """Read the header of one file. Raises ModelNotFound or UnsupportedModel."""
    try:
        with path.open("rb") as file:
            return _HeaderReader(path, file).read()
    except OSError as error:
        raise ModelNotFound(
            f"{path} cannot be read ({error.strerror}).", cure="Let this user read it, or name another file."
        ) from error


_LENGTH = struct.Struct("<Q")  # before each string


class _HeaderReader:
    """Reads one file's header from its beginning; `_data` holds what was read so far."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._data = bytearray()
        self._at = 0

    def read(self) -> GgufHeader:
        start = self._file.read(len(LFS_MAGIC))
        self._file.seek(0)
        if start.startswith(LFS_MAGIC):
            raise UnsupportedModel(f"{self._path} is a Git LFS pointer, not the file itself.", cure=LFS_CURE)
        if not start.startswith(MAGIC):
            raise UnsupportedModel(
                f"{self._path} is not a GGUF file.", cure="Name a .gguf file, a folder with safetensors, or a hub id."
            )
        self._take(len(MAGIC))
        self._check_version(self._number("I"))
        tensor_count, key_count = self._number("Q"), self._number("Q")
        if tensor_count > MAXIMUM_TENSORS or key_count > MAXIMUM_KEYS:
            raise self._broken(f"it announces {tensor_count} tensors and {key_count} keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._text(MAXIMUM_NAME_BYTES)
            if key in metadata:
                raise self._broken(f"it holds the key {key[:100]} twice")
            metadata[key] = self._value(self._number("I"), key)
        return self._with_tensors(metadata, tensor_count)

    def _with_tensors(self, metadata: dict[str, Any], tensor_count: int) -> GgufHeader:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._broken(f"its alignment is {alignment!r}, not a power of two from 8")
        found = [self._tensor() for _ in range(tensor_count)]
        data_start = -(-self._at // alignment) * alignment
        entries: dict[str, TensorEntry] = {}
        for name, entry in found:
            first = data_start + entry.first_byte
            if entry.first_byte % alignment:
                raise self._broken(
                    f"tensor {name} begins at {entry.first_byte}, which is not a multiple of {alignment}"
                )
            if first + entry.byte_count > self._file_bytes:
                missing = first + entry.byte_count - self._file_bytes
                raise self._broken(f"tensor {name} ends {missing} bytes after the file's end")
            if name in entries:
                raise self._broken(f"it holds the tensor {name} twice")
            entries[name] = TensorEntry(self._path, entry.dtype, entry.shape, first, entry.byte_count)
        if overlapping := first_overlap(entries):
            raise self._broken("tensors {} and {} overlap".format(*overlapping))
        return GgufHeader(metadata, entries, data_start if entries else self._at)

    def _tensor(self) -> tuple[str, TensorEntry]:
        name = self._text(MAXIMUM_NAME_BYTES)
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAXIMUM_DIMENSIONS:
            raise self._broken(f"tensor {name[:100]} has {dimensions} dimensions")
        sizes = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        number, offset = self._number("I"), self._number("Q")
        if not all(1 <= size <= MAXIMUM_SIZE for size in sizes):
            raise self._broken(f"tensor {name[:100]} has the sizes {list(sizes)}")
        kind = GGML_TYPE_BY_NUMBER.get(number)
        if kind is None:
            raise UnsupportedModel(
                f"tensor {name[:100]} of {self._path} is of type number {number}, which noodle's ggml does not know.",
                cure="Take the model in another format: this one may be a fork's, newer, or given up.",
            )
        if sizes[0] % kind.block_items:
            raise self._broken(
                f"{name[:100]} has rows of {sizes[0]} items, not whole blocks of {kind.block_items} ({kind.name})"
            )
        byte_count = kind.byte_count(math.prod(sizes))
        return name, TensorEntry(self._path, kind.name, tuple(reversed(sizes)), offset, byte_count)

    def _check_version(self, version: int) -> None:
        if version in VERSIONS:
            return
        if version & 0xFFFF == 0:
            raise UnsupportedModel(
                f"{self._path} is a big-endian GGUF file, for machines with the other byte order.",
                cure="Fetch the ordinary (little-endian) file of this model.",
            )
        raise UnsupportedModel(
            f"{self._path} is of GGUF version {version}; noodle reads {VERSIONS[0]} and {VERSIONS[1]}.",
            cure="Fetch the model again as a newer file."
            if version < VERSIONS[0]
            else "Update noodle, or take an older file of this model.",
        )

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text(MAXIMUM_TEXT_BYTES)
        if kind == ARRAY:
            return self._array(key)
        code = _SCALARS.get(kind)
        if code is None:
            raise self._broken(f"the value of {key[:100]} is of the unknown type {kind}")
        value = self._number(code)
        return bool(value) if kind == BOOL else value

    def _array(self, key: str) -> list[Any] | GgufArray:
        kind, count = self._number("I"), self._number("Q")
        if kind == ARRAY or (kind != STRING and kind not in _SCALARS):
            raise self._broken(f"{key[:100]} is an array of " + ("arrays" if kind == ARRAY else f"the type {kind}"))
        least_bytes = 8 if kind == STRING else struct.calcsize(_SCALARS[kind])
        if count * least_bytes > self._file_bytes - self._at:
            raise self._broken(f"{key[:100]} announces {count} items, more than the file has room for")
        first = self._at
        if kind == STRING:
            self._skip_texts(count)
        else:
            self._need(count * least_bytes)
            self._at += count * least_bytes
        if count > SHORT_ARRAY_ITEMS:
            return GgufArray(self._path, kind, count, first, self._at - first)
        return _items(self._data, first, kind, count)

    def _skip_texts(self, count: int) -> None:
        """Pass strings, of which a vocabulary has hundreds of thousands: calls are avoided."""
        length_at, at, known_bytes = _LENGTH.unpack_from, self._at, len(self._data)
        for _ in range(count):
            if at + 8 > known_bytes:
                self._at = at
                self._need(8)
                known_bytes = len(self._data)
            at += 8 + length_at(self._data, at)[0]
            if at > known_bytes:
                self._at = known_bytes
                self._need(at - known_bytes)
                known_bytes = len(self._data)
        self._at = at

    def _text(self, maximum_bytes: int) -> str:
        byte_count = self._number("Q")
        if byte_count > maximum_bytes:
            raise self._broken(f"it holds a string of {byte_count} bytes where at most {maximum_bytes} are expected")
        return self._take(byte_count).decode("utf-8", "surrogateescape")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, byte_count: int) -> bytes:
        self._need(byte_count)
        self._at += byte_count
        return bytes(self._data[self._at - byte_count : self._at])

    def _need(self, byte_count: int) -> None:
        """Read on until `byte_count` more bytes are there."""
        end = self._at + byte_count
        if end <= len(self._data):
            return
        if end > self._file_bytes:
            raise self._broken("its header is longer than the file")
        if end > MAXIMUM_HEADER_BYTES:
            raise self._broken(f"its header is longer than {MAXIMUM_HEADER_BYTES} bytes")
        wanted = max(end, 2 * len(self._data), READ_BYTES)
        self._data += self._file.read(wanted - len(self._data))
        if end > len(self._data):
            raise self._broken("it was cut short while it was read")

    def _broken(self, why: str) -> UnsupportedModel:
        return _broken(self._path, why)


def _items(data: bytes | bytearray, first: int, kind: int, count: int) -> list[Any]:
    """Items of an array whose bytes are all there."""
    if kind == STRING:
        return list(_strings(data, first, count))
    values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", data, first)
    return [bool(value) for value in values] if kind == BOOL else list(values)


def _strings(data: bytes | bytearray, at: int, count: int) -> Iterator[str]:
    for _ in range(count):
        begin = at + 8
        at = begin + int.from_bytes(data[at:begin], "little")
        yield data[begin:at].decode("utf-8", "surrogateescape")


def _broken(path: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path} is not a complete GGUF file: {why}.", cure=FETCH_CURE)
