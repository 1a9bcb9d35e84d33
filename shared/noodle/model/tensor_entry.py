"""The place of one tensor in a model's files."""

from __future__ import annotations

import math
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
