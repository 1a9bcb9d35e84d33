"""K and V of one session as torch tensors, one allocation per layer.

On a CPU the rows are pages that the system commits as they are written; a card has no such pages.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field

import torch


@dataclass(eq=False, slots=True)
class SessionRows:
    """`Rows` in torch tensors."""

    reserve_tokens: int
    counted_tokens: int = 0
    length: int = 0
    bytes_allocated: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [1, kv_heads, reserve_tokens, head_dim]
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def write(
        self, layer: int, first_position: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V `[1, kv_heads, tokens, head_dim]` to their rows; returns the layer's whole K and V."""
        keys = self.keys.get(layer)
        if keys is None:
            keys = self._allocate(self.keys, layer, key)
            self._allocate(self.values, layer, value)
        values = self.values[layer]
        tokens = key.shape[2]
        keys.narrow(2, first_position, tokens).copy_(key)
        values.narrow(2, first_position, tokens).copy_(value)
        return keys, values

    def grow(self, reserve_tokens: int) -> None:
        """Move the layers one by one, so little is held twice."""
        for rows_by_layer in (self.keys, self.values):
            for layer, old in rows_by_layer.items():
                _, kv_heads, held_tokens, head_dim = old.shape
                rows = _empty_rows((1, kv_heads, reserve_tokens, head_dim), old)
                kept = min(self.length, held_tokens)
                rows.narrow(2, 0, kept).copy_(old.narrow(2, 0, kept))
                rows_by_layer[layer] = rows
                self.bytes_allocated += rows.nbytes - old.nbytes
        self.reserve_tokens = reserve_tokens

    def copy_from(self, other: SessionRows, tokens: int) -> None:
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, rows in theirs.items():
                if layer not in ours:
                    self._allocate(ours, layer, rows)
                ours[layer].narrow(2, 0, tokens).copy_(rows.narrow(2, 0, tokens))
        self.length = max(self.length, tokens)

    @torch.inference_mode()
    def fill_with_noise(self, tokens: int) -> None:
        for rows in (*self.keys.values(), *self.values.values()):
            rows[:, :, :tokens].normal_()
        self.length = max(self.length, tokens)

    def _allocate(self, rows_by_layer: dict[int, torch.Tensor], layer: int, like: torch.Tensor) -> torch.Tensor:
        _, kv_heads, _, head_dim = like.shape
        rows = _empty_rows((1, kv_heads, self.reserve_tokens, head_dim), like)
        rows_by_layer[layer] = rows
        self.bytes_allocated += rows.nbytes
        return rows


def _empty_rows(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Rows on the same device; on a CPU in small pages of their own, committed when written and freed with the tensor.

    torch's allocator may keep freed memory, and a large page would commit 2 MB for the first row.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    item_count = math.prod(shape)
    pages = mmap.mmap(-1, max(1, item_count * like.dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype, count=item_count).view(shape)
