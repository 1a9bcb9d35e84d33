"""How many KV rows each session holds on the stages, and what is kept of ended ones for those to come; pure.

The coordinator alone allocates: stages hold what steps tell them to, and free what steps tell them to (design D14).
Rows are counted as they are computed; stages that hold a session's whole reservation from its start (the memory of a
card can not be had page by page) are counted beside that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from noodle.wire.messages import PrefixCopy, ReleasedSession
from services.coordinator.engine.sequence import PlanLimits, Session

MINIMUM_PREFIX_TOKENS = 16  # fewer rows than this are as soon computed as looked for and copied
MAXIMUM_KEPT_SESSIONS = 64


@dataclass(frozen=True, slots=True)
class KeptSession:
    """An ended session whose rows still stand on every stage: `token_ids` are those of its rows."""

    session_id: str
    epoch: int
    token_ids: list[int]
    reserve_tokens: int
    cache_salt: str


class KvAccounting:
    """Rows of running sessions, and of ended ones until their room is wanted."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self.rows = 0  # of all sessions, kept ones too
        self._reserved_rows = 0
        self._kept: OrderedDict[str, KeptSession] = OrderedDict()  # the longest unused first
        self._released: list[ReleasedSession] = []

    @property
    def kept_rows(self) -> int:
        """Rows of ended sessions."""
        return sum(len(kept.token_ids) for kept in self._kept.values())

    @property
    def kept_ids(self) -> list[str]:
        """Ended sessions that stages still hold rows of."""
        return list(self._kept)

    def fits(self, session: Session, end: int, limits: PlanLimits) -> bool:
        """Whether the session's rows up to `end` have room beside all others'."""
        more = max(0, end - self._rows.get(session.session_id, 0))
        if self.rows + more > limits.kv_tokens:
            return False
        if limits.reserved_kv_tokens is None or session.session_id in self._reserved:
            return True
        return self._reserved_rows + session.reserve_tokens <= limits.reserved_kv_tokens

    def hold(self, session: Session, end: int) -> None:
        """The session's rows up to `end` are computed by a step that is on its way."""
        name = session.session_id
        before = self._rows.get(name, 0)
        self._rows[name] = max(end, before)
        self.rows += self._rows[name] - before
        if name not in self._reserved:
            self._reserved[name] = session.reserve_tokens
            self._reserved_rows += session.reserve_tokens

    def forget(self, session_id: str) -> None:
        """The stages free it by another word, or begin it anew."""
        self.rows -= self._rows.pop(session_id, 0)
        self._reserved_rows -= self._reserved.pop(session_id, 0)
        self._kept.pop(session_id, None)

    def release(self, session_id: str, epoch: int) -> None:
        """Have the stages free it with the next step."""
        if session_id in self._rows:
            self._released.append(ReleasedSession(session_id, epoch))
        self.forget(session_id)

    def take_released(self) -> list[ReleasedSession]:
        """What the next step tells the stages to free."""
        released, self._released = self._released, []
        return released

    # what is kept

    def keep(self, session: Session) -> list[str]:
        """Keep the rows of a session that has ended; gives kept ones that are no longer needed beside it."""
        token_ids = session.token_ids[: self._rows.get(session.session_id, 0)]
        redundant = [
            kept.session_id
            for kept in self._kept.values()
            if kept.cache_salt == session.cache_salt
            and len(kept.token_ids) <= len(token_ids)
            and token_ids[: len(kept.token_ids)] == kept.token_ids
        ]
        for session_id in redundant:
            self.forget(session_id)
        kept = KeptSession(session.session_id, session.epoch, token_ids, session.reserve_tokens, session.cache_salt)
        self._kept[session.session_id] = kept
        while len(self._kept) > MAXIMUM_KEPT_SESSIONS:
            oldest = next(iter(self._kept))
            self.forget(oldest)
            redundant.append(oldest)
        return redundant

    def give_up(self, session_id: str) -> None:
        """Free a kept session; harmless when it is none."""
        kept = self._kept.get(session_id)
        if kept is not None:
            self.release(session_id, kept.epoch)

    def give_up_kept(self, wanted: Collection[str]) -> bool:
        """Free the kept session that was unused for longest, but none that is wanted; False when there is none."""
        for session_id, kept in self._kept.items():
            if session_id not in wanted:
                self.release(session_id, kept.epoch)
                return True
        return False

    def forget_kept(self) -> None:
        """The rows of ended sessions are gone on some stage."""
        for session_id in list(self._kept):
            self.forget(session_id)

    def prefix_for(self, session: Session, running: Iterable[Session]) -> PrefixCopy | None:
        """The longest beginning of the session's tokens whose rows stand on every stage; its last token is computed.

        Also of sessions that run: their steps so far reach every stage before the next one does.
        """
        most = len(session.token_ids) - 1
        best: PrefixCopy | None = None
        salt = session.cache_salt
        donors = [
            (kept.session_id, kept.epoch, kept.token_ids, len(kept.token_ids))
            for kept in self._kept.values()
            if kept.cache_salt == salt
        ]
        donors += [
            (other.session_id, other.epoch, other.token_ids, other.sent)
            for other in running
            if other.cache_salt == salt
        ]
        for session_id, epoch, token_ids, rows in donors:
            least = best.token_count + 1 if best else MINIMUM_PREFIX_TOKENS
            if session_id == session.session_id or min(rows, most) < least:
                continue
            count = common_prefix_length(session.token_ids, token_ids, min(rows, most), least)
            if count >= least:
                best = PrefixCopy(session_id, epoch, count)
        if best is not None and best.session_id in self._kept:
            self._kept.move_to_end(best.session_id)
        return best


def common_prefix_length(left: Sequence[int], right: Sequence[int], most: int, least: int = 1) -> int:
    """How many of the first `most` items are equal; 0 when that is fewer than `least`. Compares slices, not items."""
    if left[:least] != right[:least]:
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
