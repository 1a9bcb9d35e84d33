"""The sessions of POST /forward on this stage: their lengths, room and age; pure, and apart from those that are served.

Nobody lists them, so they end by themselves: after a named idle time, or when a newer one needs the room. Their rows
have a budget of their own beside that of served requests, and names that no served session can have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from noodle.errors import Conflict, ContextTooLong, Unprocessable
from services.stage.executors.base import Span

MAXIMUM_FORWARD_SESSIONS = 16
FORWARD_KV_BYTES = 128 << 20  # for all of them together, and never more than served requests have
FORWARD_IDLE_SECONDS = 60.0
SMALLEST_RESERVE_TOKENS = 64
NAME_PREFIX = "forward/"  # the coordinator names served sessions by hexadecimal digits


@dataclass(slots=True)
class _Session:
    reserve_tokens: int
    used_at: float
    length: int = 0


@dataclass(frozen=True, slots=True)
class ForwardSpan:
    """What the slice is to compute, and the names of sessions whose rows are to be freed before."""

    span: Span
    displaced: list[str] = field(default_factory=list)


class ForwardSessions:
    """Lives and dies with one role of the stage; time is given, never read."""

    def __init__(self, kv_bytes: int, kv_bytes_per_token: int, context_length: int) -> None:
        self._most_tokens = kv_bytes // max(1, kv_bytes_per_token)  # of all sessions together
        self._context_length = context_length
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def admit(self, session_id: str, token_index: int | None, token_count: int, now: float) -> ForwardSpan:
        """Make room for `token_count` tokens from `token_index` on (None: where the session is).

        The sessions unused for longest make way. Raises Conflict for a gap, ContextTooLong, or Unprocessable for a
        session that has no room even alone; nothing changes then.
        """
        session = self._sessions.get(session_id)
        length = session.length if session else 0
        first_position = length if token_index is None else token_index
        if first_position > length:
            raise Conflict(
                f"Session {session_id!r} has {length} tokens on this stage, so token_index {length} is expected, "
                f"not {first_position}.",
                cure=f"Send its tokens from position {length} on; a session that is not used for "
                f"{FORWARD_IDLE_SECONDS:.0f} s, or makes way for newer ones, is forgotten and begins at 0 again.",
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
        return ForwardSpan(Span(NAME_PREFIX + session_id, first_position, token_count, reserve_tokens), displaced)

    def computed(self, session_id: str, length: int, now: float) -> None:
        """Note that the rows [0, length) are computed; what was computed beyond is no longer part of the session."""
        session = self._sessions[session_id]
        session.length, session.used_at = length, now

    def end(self, session_id: str) -> str:
        """Forget a session, known or not; gives the name whose rows are to be freed."""
        self._sessions.pop(session_id, None)
        return NAME_PREFIX + session_id

    def expire(self, now: float) -> list[str]:
        """Forget what is idle for too long; gives the names whose rows are to be freed."""
        idle = [name for name, session in self._sessions.items() if now - session.used_at > FORWARD_IDLE_SECONDS]
        return [self.end(session_id) for session_id in idle]

    def _room_for(self, tokens: int) -> int:
        """Rows to reserve for so many tokens: doubled as a session grows, so that its rows move seldom."""
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
        oldest_first = sorted(others, key=lambda name: others[name].used_at, reverse=True)
        displaced = []
        while (
            sum(each.reserve_tokens for each in others.values()) + reserve_tokens > self._most_tokens
            or len(others) + 1 > MAXIMUM_FORWARD_SESSIONS
        ):
            oldest = oldest_first.pop()
            del others[oldest]
            displaced.append(self.end(oldest))
        return displaced
