"""The sessions of POST /forward on this stage: their lengths, room and age.

The coordinator does not list them, so they end when they are idle for too long, or when a newer one needs the room.
Their rows have a budget beside that of served requests, and names that no served session can have.
"""

from __future__ import annotations

from dataclasses import dataclass

from noodle.errors import Conflict, ContextTooLong, Unprocessable
from services.stage.executors.base import Span

MAXIMUM_FORWARD_SESSIONS = 16
FORWARD_KV_BYTES = 128 << 20  # of all of them together, and never more than served requests have
FORWARD_IDLE_SECONDS = 60.0
SMALLEST_RESERVE_TOKENS = 64
NAME_PREFIX = "forward/"  # the names of served sessions are hexadecimal digits


@dataclass(slots=True)
class _Session:
    reserve_tokens: int
    used_at: float
    length: int = 0


class ForwardSessions:
    """The sessions of one role of the stage; callers pass the time."""

    def __init__(self, kv_bytes: int, kv_bytes_per_token: int, context_length: int) -> None:
        self._most_tokens = kv_bytes // max(1, kv_bytes_per_token)  # of all sessions together
        self._context_length = context_length
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def admit(self, session_id: str, token_index: int | None, token_count: int, now: float) -> tuple[Span, list[str]]:
        """Make room for `token_count` tokens from `token_index` on (None: the session's end).

        Returns their span, and the names of the least recently used sessions that it displaces, whose rows must be
        freed before. Raises Conflict for a gap, ContextTooLong, or Unprocessable for a session that is too long even
        alone; nothing changes then.
        """
        session = self._sessions.get(session_id)
        length = session.length if session else 0
        first_position = length if token_index is None else token_index
        if first_position > length:
            raise Conflict(
                f"Session {session_id!r} has {length} tokens on this stage, so token_index {length} is expected, "
                f"not {first_position}.",
                cure=f"Send its tokens from position {length} on. A session that is unused for "
                f"{FORWARD_IDLE_SECONDS:.0f} s, or displaced by newer ones, begins at 0 again.",
                param="token_index",
            )
        end = first_position + token_count
        if end > self._context_length:
            raise ContextTooLong(
                f"The tokens end at position {end}, the context is {self._context_length}.",
                cure="Begin another session.",
                param="token_index",
            )
        reserve_tokens = max(self._room_for(end), session.reserve_tokens if session else 0)
        displaced = self._displace(session_id, reserve_tokens)
        if session is None:
            session = self._sessions[session_id] = _Session(reserve_tokens, now)
        session.reserve_tokens, session.used_at = reserve_tokens, now
        return Span(NAME_PREFIX + session_id, first_position, token_count, reserve_tokens), displaced

    def computed(self, session_id: str, length: int, now: float) -> None:
        """Set the session's computed rows to [0, length); rows beyond are no longer part of it."""
        session = self._sessions[session_id]
        session.length, session.used_at = length, now

    def end(self, session_id: str) -> str:
        """Drop a session, known or not; returns the name whose rows must be freed."""
        self._sessions.pop(session_id, None)
        return NAME_PREFIX + session_id

    def expire(self, now: float) -> list[str]:
        """Drop sessions that are idle for too long; returns the names whose rows must be freed."""
        idle = [name for name, session in self._sessions.items() if now - session.used_at > FORWARD_IDLE_SECONDS]
        return [self.end(session_id) for session_id in idle]

    def _room_for(self, tokens: int) -> int:
        """Rows to reserve for `tokens` tokens: doubled as a session grows, so that its rows move rarely."""
        most_tokens = min(self._most_tokens, self._context_length)
        if tokens > most_tokens:
            raise Unprocessable(
                f"The session would have {tokens} tokens; this stage has room for {most_tokens} in forwards by hand.",
                cure="Begin another session, or generate by /generate, which has the room of NOODLE_KV_BYTES.",
                param="token_index",
            )
        return min(most_tokens, max(SMALLEST_RESERVE_TOKENS, 1 << (tokens - 1).bit_length()))

    def _displace(self, session_id: str, reserve_tokens: int) -> list[str]:
        others = {name: each for name, each in self._sessions.items() if name != session_id}
        newest_first = sorted(others, key=lambda name: others[name].used_at, reverse=True)
        displaced = []
        while (
            sum(others[name].reserve_tokens for name in newest_first) + reserve_tokens > self._most_tokens
            or len(newest_first) + 1 > MAXIMUM_FORWARD_SESSIONS
        ):
            displaced.append(self.end(newest_first.pop()))
        return displaced
