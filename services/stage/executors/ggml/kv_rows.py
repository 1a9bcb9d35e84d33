"""K and V of one session where ggml computes: in host memory or in a card's."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from services.stage.executors.ggml.backend import DeviceMemory, GgmlDevice

AREA_ALIGNMENT = 256  # whole cache lines, and the alignment that cards want for their tensors
NOISE = 0x2C  # any byte that gives small numbers in every type: 0x2c2c is 0.065 in float16


class GgmlRows:
    """Rows 0 to `reserve_tokens` of K and of V in every layer, an area each, in pages committed as they are written.

    Area 2 * layer holds the layer's K and the next one its V; a row holds one token's values of all KV heads. Latent
    attention has one area in each layer. With `block_tokens` above 1, rows of this many tokens are interleaved: an area
    has whole blocks, and the rows after the last token of a block mean nothing.
    """

    address: int  # of the first area
    buffer: int = 0  # ggml's buffer of a card's memory; 0 in host memory
    memory: Any

    def __init__(self, reserve_tokens: int, *, areas: int, row_bytes: int, block_tokens: int = 1) -> None:
        self.counted_tokens = 0  # in the budget
        self.length = 0  # rows [0, length) are computed in all layers
        self._areas = areas  # in all layers
        self._row_bytes = row_bytes
        self._block_tokens = block_tokens
        self._allocate(reserve_tokens)

    def grow(self, reserve_tokens: int) -> None:
        before, area_bytes = self.memory, self.area_bytes
        self._allocate(reserve_tokens)
        self._copy(before, area_bytes, self.length)

    def copy_from(self, other: GgmlRows, tokens: int) -> None:
        self._copy(other.memory, other.area_bytes, tokens)
        self.length = max(self.length, tokens)

    def fill_with_noise(self, tokens: int) -> None:
        self.memory[:, : self._bytes_of(tokens)] = NOISE
        self.length = max(self.length, tokens)

    def _allocate(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        self.area_bytes = -(-self._bytes_of(max(1, reserve_tokens)) // AREA_ALIGNMENT) * AREA_ALIGNMENT
        self.bytes_allocated = self._areas * self.area_bytes
        self._new_memory()

    def _bytes_of(self, tokens: int) -> int:
        """Bytes of an area that hold the first tokens, in whole blocks."""
        return -(-tokens // self._block_tokens) * self._block_tokens * self._row_bytes

    def _new_memory(self) -> None:
        pages = mmap.mmap(-1, self.bytes_allocated, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a large page would commit 2 MB for the first row
        self.memory = np.frombuffer(pages, np.uint8).reshape(self._areas, self.area_bytes)
        self.address = int(self.memory.ctypes.data)

    def _copy(self, source: Any, _area_bytes: int, tokens: int) -> None:
        copied_bytes = self._bytes_of(tokens)
        self.memory[:, :copied_bytes] = source[:, :copied_bytes]


class DeviceRows(GgmlRows):
    """The same in a card's memory, which is allocated as a whole."""

    def __init__(self, reserve_tokens: int, *, areas: int, row_bytes: int, device: GgmlDevice) -> None:
        self._device = device
        super().__init__(reserve_tokens, areas=areas, row_bytes=row_bytes)

    def fill_with_noise(self, tokens: int) -> None:
        """Fill all rows with noise."""
        self.memory.fill(NOISE)
        self.length = max(self.length, tokens)

    def _new_memory(self) -> None:
        self.memory = DeviceMemory(self._device, self.bytes_allocated)
        self.address, self.buffer = self.memory.address, int(self.memory.buffer)

    def _copy(self, source: DeviceMemory, area_bytes: int, tokens: int) -> None:
        for area in range(self._areas):
            self.memory.copy_from(source, area * area_bytes, area * self.area_bytes, tokens * self._row_bytes)
