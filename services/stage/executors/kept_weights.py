"""Files of weights that were made in another type than the model's: one block of tensors in each."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from noodle.folders import write_atomically

log = logging.getLogger(__name__)

HEADER_BYTES = 1 << 16
MAGIC = b"noodle ggml weights 1\n"
SAMPLES, SAMPLE_BYTES = 64, 4096

Bytes = npt.NDArray[np.uint8]
Layout = list[list[Any]]  # of the tensors in a block


class KeptHeader(msgspec.Struct, frozen=True):
    """JSON at the beginning of a kept file, after MAGIC."""

    layout: Layout
    digest: str  # of samples of the block


def read_kept(path: Path, layout: Layout, memory: Bytes) -> bool:
    """Read a block into `memory`; False if the file is missing, damaged or of another layout."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != HEADER_BYTES + len(memory):
                return False
            header = file.read(HEADER_BYTES).rstrip(b"\0")
            if not header.startswith(MAGIC):
                return False
            described = msgspec.json.decode(header.removeprefix(MAGIC), type=KeptHeader)
            if described.layout != layout:
                return False
            done = 0
            while done < len(memory):
                read = file.readinto(memory[done:].data)
                if not read:
                    return False
                done += read
    except FileNotFoundError:
        return False
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be read and is made again: %s", path, error)
        return False
    if described.digest != _sampled_digest(memory):
        log.warning("%s is damaged and is made again", path)
        return False
    return True


def keep(path: Path, layout: Layout, memory: Bytes) -> None:
    """Write a block's file as a whole; a block that cannot be written is made again at each start."""
    header = MAGIC + msgspec.json.encode(KeptHeader(layout, _sampled_digest(memory)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, header.ljust(HEADER_BYTES, b"\0"), memory.data)
    except OSError as error:
        log.warning("%s is not kept (%s): it is made again at each start", path, error.strerror or error)


def _sampled_digest(data: Bytes) -> str:
    """sha256 of samples spread evenly over the data, both ends included."""
    digest = hashlib.sha256()
    last = max(0, len(data) - SAMPLE_BYTES)
    for sample in range(SAMPLES):
        start = last * sample // (SAMPLES - 1)
        digest.update(data[start : start + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()
