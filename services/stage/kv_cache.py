"""KV rows by session and layer under a byte budget; knows tensors and sizes, neither models nor attention.

A session's rows are allocated once, for as many tokens as it reserves, so that a served request, which knows how many
that is, copies nothing. A session that reserves more later gets larger rows, and what is computed is copied. On a CPU
the system commits those pages only as they are written.
"""

from __future__ import annotations

import torch

from noodle.errors import PositionGap, StepRefused


class SessionRows:
    """K and V of one session in every layer of a slice, rows 0 to `reserve_tokens`."""

    __slots__ = ("bytes_held", "keys", "length", "reserve_tokens", "values")

    def __init__(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        self.length = 0  # rows [0, length) are computed in all layers
        self.bytes_held = 0
        self.keys: dict[int, torch.Tensor] = {}  # layer -> [1, kv_heads, reserve_tokens, head_dim]
        self.values: dict[int, torch.Tensor] = {}

    def write(
        self, layer: int, first_position: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put K and V `[1, kv_heads, tokens, head_dim]` at their rows; the layer's whole K and V come back."""
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
        """Make room for more tokens; computed rows are kept. One layer after the other, so little is held twice."""
        for rows_by_layer in (self.keys, self.values):
            for layer, old in rows_by_layer.items():
                _, kv_heads, held_tokens, head_dim = old.shape
                rows = torch.empty(1, kv_heads, reserve_tokens, head_dim, dtype=old.dtype, device=old.device)
                kept = min(self.length, held_tokens)
                rows.narrow(2, 0, kept).copy_(old.narrow(2, 0, kept))
                rows_by_layer[layer] = rows
                self.bytes_held += rows.nbytes - old.nbytes
        self.reserve_tokens = reserve_tokens

    def _allocate(self, rows_by_layer: dict[int, torch.Tensor], layer: int, like: torch.Tensor) -> torch.Tensor:
        _, kv_heads, _, head_dim = like.shape
        rows = torch.empty(1, kv_heads, self.reserve_tokens, head_dim, dtype=like.dtype, device=like.device)
        rows_by_layer[layer] = rows
        self.bytes_held += rows.nbytes
        return rows


class KvCache:
    """The rows of all sessions of one slice; `budget_bytes` None is no bound."""

    def __init__(self, budget_bytes: int | None = None, bytes_per_token: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self.bytes_per_token = bytes_per_token  # over all layers of the slice
        self._sessions: dict[str, SessionRows] = {}
        self._reserved_tokens = 0

    def open(self, session_id: str, reserve_tokens: int) -> SessionRows:
        """The rows of a session, reserved when it is new or asks for more than before.

        Raises StepRefused with reason `kv_budget` when the reservation would pass the budget; nothing changes then.
        """
        rows = self._sessions.get(session_id)
        more_tokens = reserve_tokens - (rows.reserve_tokens if rows else 0)
        if rows is not None and more_tokens <= 0:
            return rows
        wanted_bytes = (self._reserved_tokens + more_tokens) * self.bytes_per_token
        if self.budget_bytes is not None and wanted_bytes > self.budget_bytes:
            raise StepRefused(
                f"session {session_id} reserves {reserve_tokens} tokens of KV cache "
                f"({reserve_tokens * self.bytes_per_token} bytes), but {self._reserved_tokens * self.bytes_per_token} "
                f"of this stage's {self.budget_bytes} bytes are taken.",
                reason="kv_budget",
                cure="Wait for other requests to end, ask for fewer tokens, or raise NOODLE_KV_BYTES on this stage.",
            )
        if rows is None:
            rows = self._sessions[session_id] = SessionRows(reserve_tokens)
        else:
            rows.grow(reserve_tokens)
        self._reserved_tokens += more_tokens
        return rows

    def check_span(self, session_id: str, rows: SessionRows, first_position: int, token_count: int) -> None:
        """Refuse rows that were not reserved, or that leave a gap before them."""
        if first_position > rows.length:
            raise PositionGap(
                f"session {session_id}: position {first_position} came, but only {rows.length} rows are computed."
            )
        if first_position + token_count > rows.reserve_tokens:
            raise StepRefused(
                f"session {session_id}: positions up to {first_position + token_count} came, "
                f"but it reserved {rows.reserve_tokens}.",
                reason="beyond_reserve",
            )

    def holds(self, session_id: str) -> bool:
        """Whether rows are reserved for a session."""
        return session_id in self._sessions

    def release(self, session_id: str) -> None:
        """Free a session's rows; one that holds none is fine."""
        rows = self._sessions.pop(session_id, None)
        if rows is not None:
            self._reserved_tokens -= rows.reserve_tokens

    def bytes_held(self) -> int:
        """Bytes allocated for the rows of all sessions."""
        return sum(rows.bytes_held for rows in self._sessions.values())
