"""K and V of one session where ggml computes, in the machine's memory or a card's; knows bytes and rows, no budget."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from services.stage.executors.ggml.device import DeviceMemory, GgmlDevice

AREA_ALIGNMENT = 256
NOISE = 0x2C  # any bytes will do that are small numbers in every type: 0x2c2c is 0.065 in float16


class GgmlRows:
    """Rows 0 to `reserve_tokens` of K and of V in every layer: an area each, in pages that commit as they are written.

    Area 2 * layer holds the layer's K and the next one its V; a row is one token's, of all KV heads.
    """

    buffer = 0  # the system's memory is none of ggml's

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

    def fill_with_noise(self, tokens: int) -> None:
        """Let so many rows hold numbers that were not computed."""
        self.memory[:, : tokens * self._row_bytes] = NOISE
        self.length = max(self.length, tokens)

    def _allocate(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        self.area_bytes = _area_bytes(reserve_tokens, self._row_bytes)
        self.bytes_allocated = self._areas * self.area_bytes
        pages = mmap.mmap(-1, self.bytes_allocated, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # large pages would commit 2 MB for the first row
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(pages, np.uint8).reshape(self._areas, self.area_bytes)
        self.address = int(self.memory.ctypes.data)


class DeviceRows:
    """The same in a card's memory, which is taken whole at once."""

    def __init__(self, reserve_tokens: int, *, layers: int, row_bytes: int, device: GgmlDevice) -> None:
        self.counted_tokens = self.length = 0
        self._areas, self._row_bytes, self._device = 2 * layers, row_bytes, device
        self._allocate(reserve_tokens)

    @property
    def address(self) -> int:
        """Of the first area, as the card has it."""
        return self._memory.address

    @property
    def buffer(self) -> int:
        """What ggml knows the memory by."""
        return int(self._memory.buffer)

    def grow(self, reserve_tokens: int) -> None:
        """Make room for more tokens; computed rows are kept."""
        before, area_bytes = self._memory, self.area_bytes
        self._allocate(reserve_tokens)
        self._copy(before, area_bytes, self.length)

    def copy_from(self, other: DeviceRows, tokens: int) -> None:
        """Take the first rows of another session as one's own: its tokens up to there are the same."""
        self._copy(other._memory, other.area_bytes, tokens)
        self.length = max(self.length, tokens)

    def fill_with_noise(self, tokens: int) -> None:
        """Let so many rows hold numbers that were not computed."""
        self._memory.fill(NOISE)
        self.length = max(self.length, tokens)

    def _copy(self, source: DeviceMemory, area_bytes: int, tokens: int) -> None:
        for area in range(self._areas):
            self._memory.copy_from(source, area * area_bytes, area * self.area_bytes, tokens * self._row_bytes)

    def _allocate(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        self.area_bytes = _area_bytes(reserve_tokens, self._row_bytes)
        self.bytes_allocated = self._areas * self.area_bytes
        self._memory = DeviceMemory(self._device, self.bytes_allocated)


def _area_bytes(reserve_tokens: int, row_bytes: int) -> int:
    """Areas begin at whole cache lines, and at what cards want their tensors to begin at."""
    return -(-max(1, reserve_tokens) * row_bytes // AREA_ALIGNMENT) * AREA_ALIGNMENT
