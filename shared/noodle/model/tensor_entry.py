"""The place of one tensor in a model's files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a file holds it."""

    file: Path
    dtype: str  # safetensors' or ggml's name: F32, BF16, F8_E4M3, Q4_K, ...
    shape: tuple[int, ...]  # row-major: the row length comes last
    first_byte: int  # from the start of the file
    byte_count: int

    @property
    def item_count(self) -> int:
        return math.prod(self.shape)


def first_overlap(entries: Mapping[str, TensorEntry]) -> tuple[str, str] | None:
    """The names of the first two tensors of one file that share bytes, or None."""
    in_order = sorted(entries.items(), key=lambda item: (item[1].first_byte, item[1].byte_count))
    for (name, entry), (other, following) in itertools.pairwise(in_order):
        if entry.first_byte + entry.byte_count > following.first_byte:
            return name, other
    return None
