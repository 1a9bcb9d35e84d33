"""KV rows by session, within a byte budget.

A session's rows are allocated once for all the tokens that it reserves, so a served request, which knows its length,
copies nothing. If a session reserves more later, it gets larger rows and its computed rows are copied.

On a CPU the system commits pages as they are written, so a session counts with the rows that it has computed. A card
has no such pages: there a session counts with the rows that it reserves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar

from noodle.errors import PositionGap, StepRefused
from services.stage.executors.base import Span


class Rows(Protocol):
    """K and V of one session in every layer of a slice, rows 0 to `reserve_tokens`."""

    reserve_tokens: int
    counted_tokens: int  # in the budget
    length: int  # rows [0, length) are computed in all layers
    bytes_allocated: int

    def grow(self, reserve_tokens: int) -> None:
        """Make room for more tokens; computed rows are kept."""

    def copy_from(self, other: Self, tokens: int) -> None:
        """Copy the first rows of a session whose tokens up to there are the same."""

    def fill_with_noise(self, tokens: int) -> None:
        """Fill rows with numbers that were not computed."""


AnyRows = TypeVar("AnyRows", bound=Rows)


class KvCache(Generic[AnyRows]):
    """The part of a ModelSlice that holds its sessions' rows, made by `new_rows(reserve_tokens)`."""

    weights_note = ""

    def __init__(
        self, new_rows: Callable[[int], AnyRows], *, kv_bytes_per_token: int = 0, reserves_upfront: bool = False
    ) -> None:
        self._new_rows = new_rows
        self._budget_bytes: int | None = None
        self.kv_bytes_per_token = kv_bytes_per_token
        self.reserves_upfront = reserves_upfront
        self._sessions: dict[str, AnyRows] = {}
        self._counted_tokens = 0

    def reserve(self, session_id: str, reserve_tokens: int, end: int) -> AnyRows:
        """See ModelSlice. Returns the rows, moved to larger ones if the session reserves more than before."""
        rows = self._sessions.get(session_id)
        counted = reserve_tokens if self.reserves_upfront else end
        more_tokens = max(0, counted - (rows.counted_tokens if rows else 0))
        taken_bytes = self.kv_bytes_held()
        wanted_bytes = taken_bytes + more_tokens * self.kv_bytes_per_token
        if more_tokens and self._budget_bytes is not None and wanted_bytes > self._budget_bytes:
            raise StepRefused(
                f"session {session_id} needs {counted} tokens of KV cache ({counted * self.kv_bytes_per_token} bytes), "
                f"but {taken_bytes} of this stage's {self._budget_bytes} bytes are taken.",
                reason="kv_budget",
                cure="Wait for other requests to end, ask for fewer tokens, or raise NOODLE_KV_BYTES on this stage.",
            )
        if rows is None:
            rows = self._sessions[session_id] = self._new_rows(reserve_tokens)
        elif reserve_tokens > rows.reserve_tokens:
            rows.grow(reserve_tokens)
        rows.counted_tokens += more_tokens
        self._counted_tokens += more_tokens
        return rows

    def open_spans(self, spans: Sequence[Span]) -> list[AnyRows]:
        """Rows of each span of a step, checked. If one is refused, rows opened for the others are released."""
        opened: list[str] = []
        found: list[AnyRows] = []
        try:
            for span in spans:
                if not self.holds(span.session_id):
                    opened.append(span.session_id)
                rows = self.reserve(span.session_id, span.reserve_tokens, span.first_position + span.token_count)
                self.check_span(span.session_id, rows, span.first_position, span.token_count)
                found.append(rows)
        except Exception:
            for session_id in opened:
                self.release(session_id)
            raise
        return found

    def copy_rows(self, from_session_id: str, to_session_id: str, tokens: int, reserve_tokens: int) -> None:
        source = self._sessions.get(from_session_id)
        if source is None or source.length < tokens:
            raise PositionGap(f"session {from_session_id} has no {tokens} rows for session {to_session_id}.")
        self.reserve(to_session_id, reserve_tokens, tokens).copy_from(source, tokens)

    def check_span(self, session_id: str, rows: AnyRows, first_position: int, token_count: int) -> None:
        """Refuse rows that were not reserved, and rows after a gap."""
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
        return session_id in self._sessions

    def release(self, session_id: str) -> None:
        rows = self._sessions.pop(session_id, None)
        if rows is not None:
            self._counted_tokens -= rows.counted_tokens

    def fill_rows_with_noise(self, session_id: str, tokens: int) -> None:
        self.reserve(session_id, tokens, tokens).fill_with_noise(tokens)

    def set_kv_budget(self, budget_bytes: int | None) -> None:
        self._budget_bytes = budget_bytes

    def kv_bytes_held(self) -> int:
        return self._counted_tokens * self.kv_bytes_per_token

    def bytes_allocated(self) -> int:
        """Bytes of all allocated rows, committed or not."""
        return sum(rows.bytes_allocated for rows in self._sessions.values())
