"""Which tokens of which session this stage has computed, and what to do with a span that comes; pure (design D2).

Per session: spans are applied in position order; older epochs are dropped and counted; rows that exist are computed
again into the same place; a few early spans are held until the gap before them closes or their time is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from noodle.wire.messages import ReleasedSession, SpanRefusal, Step, StepSpan

MAXIMUM_EARLY_SPANS = 16  # of one session
MAXIMUM_EARLY_BYTES = 64 << 20  # of all sessions
UNLISTED_SECONDS = 5.0  # a session that is in none of the coordinator's lists for so long is freed


@dataclass(slots=True)
class EarlySpan:
    """A span whose earlier tokens have not come: a step of its own that waits."""

    step: Step
    body: memoryview
    expires_at: float


@dataclass(slots=True)
class StageSession:
    """What is known of one session: `length` rows of its KV cache are computed."""

    epoch: int
    listed_at: float
    length: int = 0
    early: dict[int, EarlySpan] = field(default_factory=dict)


@dataclass(slots=True)
class Admission:
    """What to do with a step: `compute` are indexes of its spans, in order."""

    compute: list[int] = field(default_factory=list)
    refusals: list[SpanRefusal] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)  # sessions whose KV rows of an older epoch are to be freed
    copies: list[int] = field(default_factory=list)  # of `compute`, spans whose session begins with another's rows
    dropped: dict[str, int] = field(default_factory=dict)  # spans by reason


class SessionTable:
    """All sessions of this stage; time is given, never read."""

    def __init__(self, stage_id: int) -> None:
        self._stage_id = stage_id
        self._sessions: dict[str, StageSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def length(self, session_id: str) -> int:
        """Computed rows of a session, 0 when it is unknown."""
        session = self._sessions.get(session_id)
        return session.length if session else 0

    def admit(self, step: Step, body: memoryview, row_bytes: int, now: float) -> Admission:
        """Sort a step's spans into computed now, held, refused and dropped; held ones keep a copy of their rows."""
        admission = Admission()
        row = 0
        for index, span in enumerate(step.spans):
            rows = body[row * row_bytes : (row + span.token_count) * row_bytes]
            row += span.token_count
            session = self._sessions.get(span.session_id)
            if session is not None and span.session_epoch < session.epoch:
                admission.dropped["old_session_epoch"] = admission.dropped.get("old_session_epoch", 0) + 1
                continue
            if session is None or span.session_epoch > session.epoch:
                if session is not None:
                    admission.restarted.append(span.session_id)
                session = self._sessions[span.session_id] = StageSession(span.session_epoch, listed_at=now)
                if span.prefix is not None and span.prefix.token_count == span.first_position:
                    donor = self._sessions.get(span.prefix.session_id)
                    has_rows = donor is not None and donor.epoch == span.prefix.session_epoch
                    if donor is None or not has_rows or donor.length < span.first_position:
                        message = f"The rows of {span.prefix.session_id} that it was to begin with are not here."
                        admission.refusals.append(self._refusal(span, "prefix_lost", message))
                        del self._sessions[span.session_id]
                        continue
                    session.length = span.first_position
                    admission.copies.append(index)
            if span.first_position <= session.length:
                admission.compute.append(index)
            elif len(session.early) < MAXIMUM_EARLY_SPANS and self._early_bytes() + rows.nbytes <= MAXIMUM_EARLY_BYTES:
                alone = msgspec.structs.replace(
                    step, spans=[span], shape=[span.token_count, *step.shape[1:]], refusals=[], released=[]
                )
                session.early[span.first_position] = EarlySpan(alone, memoryview(bytes(rows)), now + step.gap_seconds)
            else:
                admission.refusals.append(
                    self._refusal(span, "too_many_early", "Too many spans wait for earlier tokens already.")
                )
        return admission

    def computed(self, spans: list[StepSpan]) -> list[EarlySpan]:
        """Note that these spans are computed; returns early ones whose gap this closed, in position order."""
        ready: list[EarlySpan] = []
        for span in spans:
            session = self._sessions[span.session_id]
            session.length = max(session.length, span.first_position + span.token_count)
            for position in sorted(session.early):
                if position <= session.length:
                    ready.append(session.early.pop(position))
        return ready

    def failed(self, spans: list[StepSpan]) -> None:
        """Forget sessions whose rows could not be computed; the coordinator begins them anew or ends them."""
        for span in spans:
            self._sessions.pop(span.session_id, None)

    def listed(self, session_ids: list[str], now: float) -> list[str]:
        """Note which sessions the coordinator knows; forgets and returns those that it has not listed for too long.

        Only a list that lacks a session says anything against it: silence is that of a stage before this one which
        computes, or of a coordinator that is away and will take its sessions up again.
        """
        for session_id in session_ids:
            session = self._sessions.get(session_id)
            if session is not None:
                session.listed_at = now
        return self.release(
            [name for name, session in self._sessions.items() if now - session.listed_at > UNLISTED_SECONDS]
        )

    def release_old(self, released: list[ReleasedSession]) -> list[str]:
        """Forget these sessions, but not those that have begun anew since; returns those that were known."""
        found = [each for each in released if each.session_id in self._sessions]
        return self.release(
            [each.session_id for each in found if self._sessions[each.session_id].epoch <= each.session_epoch]
        )

    def release(self, session_ids: list[str]) -> list[str]:
        """Forget these sessions; returns those that were known, so that their KV rows are freed."""
        return [session_id for session_id in session_ids if self._sessions.pop(session_id, None) is not None]

    def release_unlisted(self, session_ids: list[str]) -> list[str]:
        """Forget every session but these; returns those that were forgotten."""
        return self.release(list(self._sessions.keys() - set(session_ids)))

    def release_all(self) -> list[str]:
        """Forget every session: another coordinator leads or another plan is computed."""
        return self.release(list(self._sessions))

    def expire(self, now: float) -> list[tuple[Step, SpanRefusal]]:
        """Early spans whose time is over, each with its refusal."""
        gaps: list[tuple[Step, SpanRefusal]] = []
        for session in self._sessions.values():
            for position, early in list(session.early.items()):
                if early.expires_at <= now:
                    del session.early[position]
                    message = f"Tokens {session.length} to {position} of the session never came."
                    gaps.append((early.step, self._refusal(early.step.spans[0], "position_gap", message)))
        return gaps

    def _early_bytes(self) -> int:
        return sum(early.body.nbytes for session in self._sessions.values() for early in session.early.values())

    def _refusal(self, span: StepSpan, reason: str, message: str) -> SpanRefusal:
        return SpanRefusal(span.session_id, span.session_epoch, span.first_position, self._stage_id, reason, message)
