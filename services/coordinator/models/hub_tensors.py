"""Tensors that only the hub has: their bytes passed on by range."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from noodle.errors import NoodleError, NotReady
from services.coordinator.models.hub_download import HubFile, fetch_range

GIVE_UP_SECONDS = 20.0  # without a byte from the hub; then the stage is asked to retry
RETRY_SECONDS = 5  # Retry-After


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
