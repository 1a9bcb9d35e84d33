"""Tensors that only the hub has: the manifest that names them, and their bytes passed on by range."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from noodle.errors import NoodleError, NotReady
from noodle.model.files import digest_of_range, model_digest
from noodle.model.gguf import read_gguf
from noodle.model.weight_manifest import TensorRange, WeightFile, WeightManifest
from services.coordinator.models.hub_download import HubFile, fetch_range

GIVE_UP_SECONDS = 20.0  # without a byte from the hub; then the stage is asked to retry
RETRY_SECONDS = 5  # Retry-After


def describe_tensors(model: Path, names: list[str], model_name: str) -> WeightManifest:
    """The manifest of a model whose headers alone are here; its tensors have no digests."""
    file = read_gguf(model)
    name_of = dict(zip(file.parts, names, strict=True))
    return WeightManifest(
        model_name=model_name,
        model_digest=model_digest(model),
        companions=[],
        files=[
            WeightFile(name, part.stat().st_size, header_bytes, digest_of_range(part, 0, header_bytes))
            for (part, name), header_bytes in zip(name_of.items(), file.header_bytes, strict=True)
        ],
        tensors=[
            TensorRange(name, name_of[entry.file], entry.first_byte, entry.byte_count, "")
            for name, entry in file.entries.items()
        ],
        gguf=names[0],
    )


def pass_on(file: HubFile, first: int, end: int) -> Iterator[bytes]:
    """Yield the bytes [first, end) as the hub sends them. Raises NotReady before the first if it refuses."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # late, as in `hub`

    pieces = fetch_range(file, first, end, GIVE_UP_SECONDS)
    try:
        begin = next(pieces)
    except (HTTPError, OSError, NoodleError) as error:
        raise NotReady(
            f"The hub does not send {file.name} to the coordinator: {error}", retry_after_seconds=RETRY_SECONDS
        ) from error
    return chain([begin], pieces)
