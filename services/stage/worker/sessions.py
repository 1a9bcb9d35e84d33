"""Which tokens of which session this stage has computed, and what to do with a span that arrives (design D2).

Spans of a session are applied in position order. Those of an older epoch are dropped; rows that exist are computed
again into the same place; a few early spans wait until the gap before them closes or their time is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from noodle.wire.messages import ReleasedSession, SpanRefusal, Step, StepSpan
from services.stage.worker.steps import refusal_of

MAXIMUM_EARLY_SPANS = 16  # of one session
MAXIMUM_EARLY_BYTES = 64 << 20  # of all sessions
UNLISTED_SECONDS = 5.0  # a session that has been missing from the coordinator's lists for longer is freed


@dataclass(slots=True)
class EarlySpan:
    """A span whose earlier tokens have not come, as a step of its own."""

    step: Step
    body: memoryview
    expires_at: float


@dataclass(slots=True)
class StageSession:
    """One session: `length` rows of its KV cache are computed."""

    epoch: int
    listed_at: float
    length: int = 0
    early: dict[int, EarlySpan] = field(default_factory=dict)


@dataclass(slots=True)
class Admission:
    """What to do with the spans of a step; those in none of the fields wait."""

    compute: list[StepSpan] = field(default_factory=list)  # in order
    copies: list[StepSpan] = field(default_factory=list)  # of `compute`: the session begins with another one's rows
    refusals: list[SpanRefusal] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)  # sessions whose KV rows of an older epoch must be freed
    outdated: int = 0  # spans of older epochs


class SessionTable:
    """All sessions of this stage; callers pass the time."""

    def __init__(self, stage_id: int) -> None:
        self._stage_id = stage_id
        self._sessions: dict[str, StageSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def admit(self, step: Step, body: memoryview, now: float) -> Admission:
        """Decide for each span: compute, wait (with a copy of its rows), refuse or drop."""
        admission = Admission()
        row_bytes = body.nbytes // step.shape[0] if step.spans else 0
        row = 0
        for span in step.spans:
            rows = body[row * row_bytes : (row + span.token_count) * row_bytes]
            row += span.token_count
            session = self._sessions.get(span.session_id)
            if session is not None and span.session_epoch < session.epoch:
                admission.outdated += 1
                continue
            if session is None or span.session_epoch > session.epoch:
                if session is not None:
                    admission.restarted.append(span.session_id)
                session = self._begin(span, admission, now)
                if session is None:
                    continue
            if span.first_position <= session.length:
                admission.compute.append(span)
            elif len(session.early) < MAXIMUM_EARLY_SPANS and self._early_bytes() + rows.nbytes <= MAXIMUM_EARLY_BYTES:
                alone = replace(step, spans=[span], shape=[span.token_count, *step.shape[1:]], refusals=[], released=[])
                session.early[span.first_position] = EarlySpan(alone, memoryview(bytes(rows)), now + step.gap_seconds)
            else:
                message = "Too many spans wait for earlier tokens already."
                admission.refusals.append(refusal_of(span, self._stage_id, "too_many_early", message))
        return admission

    def _begin(self, span: StepSpan, admission: Admission, now: float) -> StageSession | None:
        """Begin a session in place of an older epoch; None, and a refusal, when the prefix it needs is not here."""
        session = StageSession(span.session_epoch, listed_at=now)
        prefix = span.prefix
        if prefix is not None and prefix.token_count == span.first_position:
            donor = self._sessions.get(prefix.session_id)
            if donor is None or donor.epoch != prefix.session_epoch or donor.length < prefix.token_count:
                message = f"The rows of {prefix.session_id} that it was to begin with are not here."
                admission.refusals.append(refusal_of(span, self._stage_id, "prefix_lost", message))
                self._sessions.pop(span.session_id, None)
                return None
            session.length = prefix.token_count
            admission.copies.append(span)
        self._sessions[span.session_id] = session
        return session

    def computed(self, spans: list[StepSpan]) -> list[EarlySpan]:
        """Mark these spans as computed; returns early ones whose gap this closed, in position order."""
        ready: list[EarlySpan] = []
        for span in spans:
            session = self._sessions[span.session_id]
            session.length = max(session.length, span.first_position + span.token_count)
            for position in sorted(session.early):
                if position <= session.length:
                    ready.append(session.early.pop(position))
        return ready

    def listed(self, session_ids: list[str], now: float) -> list[str]:
        """Note which sessions the coordinator knows; drops and returns those that it has not listed for too long.

        Silence drops nothing: an earlier stage may be computing for long, or the coordinator is away and will continue
        its sessions.
        """
        for session_id in session_ids:
            session = self._sessions.get(session_id)
            if session is not None:
                session.listed_at = now
        return self.release(
            [name for name, session in self._sessions.items() if now - session.listed_at > UNLISTED_SECONDS]
        )

    def release_old(self, released: list[ReleasedSession]) -> list[str]:
        """Drop these sessions, except those that a newer epoch has restarted; returns the dropped ones."""
        return self.release(
            each.session_id
            for each in released
            if (session := self._sessions.get(each.session_id)) and session.epoch <= each.session_epoch
        )

    def release(self, session_ids: Iterable[str]) -> list[str]:
        """Drop these sessions; returns those that were known, whose KV rows must be freed."""
        return [session_id for session_id in session_ids if self._sessions.pop(session_id, None) is not None]

    def release_all(self, but: Iterable[str] = ()) -> list[str]:
        """Drop every session but these; returns the dropped ones."""
        return self.release(self._sessions.keys() - set(but))

    def expire(self, now: float) -> list[tuple[Step, SpanRefusal]]:
        """Drop early spans whose time is over; returns each as a step, with its refusal."""
        gaps: list[tuple[Step, SpanRefusal]] = []
        for session in self._sessions.values():
            for position, early in list(session.early.items()):
                if early.expires_at <= now:
                    del session.early[position]
                    message = f"Tokens {session.length} to {position} of the session never came."
                    refusal = refusal_of(early.step.spans[0], self._stage_id, "position_gap", message)
                    gaps.append((early.step, refusal))
        return gaps

    def _early_bytes(self) -> int:
        return sum(early.body.nbytes for session in self._sessions.values() for early in session.early.values())
