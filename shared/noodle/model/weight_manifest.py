"""The manifest of a model: the byte range and digest of each tensor (design D7).

The coordinator makes it; `weight_cache.py` reads it on the other machines.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MANIFEST_BYTES_CAP = 64 << 20  # largest manifest as JSON: a few hundred bytes for each of 200,000 tensors
MANIFEST_PATH = "/weights"
FILES_PATH = "/weights/files"

FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
Bytes = Annotated[int, Meta(ge=0, le=1 << 53)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class CompanionFile(Struct, frozen=True):
    """A small file that every machine needs whole, such as config.json."""

    name: FileName
    byte_count: Bytes
    sha256: Sha256


class WeightFile(Struct, frozen=True):
    """A file with tensors; its header (`header_bytes`, everything before the first tensor) is fetched whole."""

    name: FileName
    byte_count: Bytes
    header_bytes: Bytes
    header_sha256: Sha256


class TensorRange(Struct, frozen=True):
    """One tensor: bytes [first_byte, first_byte + byte_count) of a file.

    `sha256` is empty if only a hub has its bytes: the hub names a digest of whole files alone.
    """

    name: Annotated[str, Meta(min_length=1, max_length=1000)]
    file: FileName
    first_byte: Bytes
    byte_count: Bytes
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")]


class WeightManifest(Struct, frozen=True):
    """A whole model: a folder, or the GGUF file `gguf` (of a split one its first part) among `files`."""

    model_name: Annotated[str, Meta(min_length=1, max_length=500)]
    model_digest: Sha256
    companions: Annotated[list[CompanionFile], Meta(max_length=64)]
    files: Annotated[list[WeightFile], Meta(max_length=10_000)]
    tensors: Annotated[list[TensorRange], Meta(max_length=1_000_000)]
    gguf: FileName | None = None
