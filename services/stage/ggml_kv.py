"""K and V of one session in memory that ggml computes in; knows bytes and rows, no budget and no graph."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt


class GgmlRows:
    """Rows 0 to `reserve_tokens` of K and of V in every layer: an area each, in pages that commit as they are written.

    Area 2 * layer holds the layer's K and the next one its V; a row is one token's, of all KV heads.
    """

    __slots__ = (
        "_areas",
        "_row_bytes",
        "address",
        "area_bytes",
        "bytes_allocated",
        "counted_tokens",
        "length",
        "memory",
        "reserve_tokens",
    )

    def __init__(self, reserve_tokens: int, *, layers: int, row_bytes: int) -> None:
        self.counted_tokens = 0  # in the budget
        self.length = 0  # rows [0, length) are computed in all layers
        self._areas = 2 * layers
        self._row_bytes = row_bytes
        self._allocate(reserve_tokens)

    def grow(self, reserve_tokens: int) -> None:
        """Make room for more tokens; computed rows are kept."""
        before, kept_bytes = self.memory, self.length * self._row_bytes
        self._allocate(reserve_tokens)
        self.memory[:, :kept_bytes] = before[:, :kept_bytes]

    def copy_from(self, other: GgmlRows, tokens: int) -> None:
        """Take the first rows of another session as one's own: its tokens up to there are the same."""
        taken_bytes = tokens * self._row_bytes
        self.memory[:, :taken_bytes] = other.memory[:, :taken_bytes]
        self.length = max(self.length, tokens)

    def _allocate(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        # areas begin at whole cache lines
        self.area_bytes = -(-max(1, reserve_tokens) * self._row_bytes // 64) * 64
        self.bytes_allocated = self._areas * self.area_bytes
        pages = mmap.mmap(-1, self.bytes_allocated, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # large pages would commit 2 MB for the first row
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(pages, np.uint8).reshape(self._areas, self.area_bytes)
        self.address = int(self.memory.ctypes.data)
