"""Counts the KV rows that each session holds on the stages, and keeps rows of ended ones for equal prefixes.

The coordinator alone allocates: stages hold and free what steps say (design D14). Rows are counted as they are
computed. Stages that reserve all rows of a session at its start (memory of a graphics card cannot be had page by page)
are counted separately.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from noodle.wire.messages import PrefixCopy, ReleasedSession
from services.coordinator.engine.sequence import PlanLimits, Sequence

MINIMUM_PREFIX_TOKENS = 16  # computing fewer rows than this is as fast as finding and copying them
MAXIMUM_KEPT_SESSIONS = 64


class KvAccounting:
    """Rows of running sessions, and of ended ones until their room is needed."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self.rows = 0  # of all sessions, kept ones included
        self._reserved_rows = 0
        self.kept: OrderedDict[str, Sequence] = OrderedDict()  # ended, with rows on stages; the longest unused first
        self._released: list[ReleasedSession] = []

    @property
    def kept_rows(self) -> int:  # they are freed when their room is needed
        return sum(self._rows[session_id] for session_id in self.kept)

    def fits(self, sequence: Sequence, end: int, limits: PlanLimits) -> bool:
        more = max(0, end - self._rows.get(sequence.session_id, 0))
        if self.rows + more > limits.kv_tokens:
            return False
        if limits.reserved_kv_tokens is None or sequence.session_id in self._reserved:
            return True
        return self._reserved_rows + sequence.reserve_tokens <= limits.reserved_kv_tokens

    def hold(self, sequence: Sequence, end: int) -> None:
        """Count the sequence's rows up to `end`: a step computes them."""
        session_id = sequence.session_id
        before = self._rows.get(session_id, 0)
        self._rows[session_id] = max(end, before)
        self.rows += self._rows[session_id] - before
        if session_id not in self._reserved:
            self._reserved[session_id] = sequence.reserve_tokens
            self._reserved_rows += sequence.reserve_tokens

    def forget(self, session_id: str) -> None:
        """Stop counting a session that the stages free by another message, or restart."""
        self.rows -= self._rows.pop(session_id, 0)
        self._reserved_rows -= self._reserved.pop(session_id, 0)
        self.kept.pop(session_id, None)

    def release(self, session_id: str, epoch: int) -> None:
        """Make the stages free a session with the next step."""
        if session_id in self._rows:
            self._released.append(ReleasedSession(session_id, epoch))
        self.forget(session_id)

    def take_released(self) -> list[ReleasedSession]:
        """Return the sessions to free with the next step, once."""
        released, self._released = self._released, []
        return released

    # rows of ended sessions

    def keep(self, sequence: Sequence) -> list[str]:
        """Keep the rows of a sequence that has ended. Returns kept sessions that are no longer needed beside it."""
        most = self._rows.get(sequence.session_id, 0)
        redundant = [
            session_id
            for session_id, kept in self.kept.items()
            if kept.request.cache_salt == sequence.request.cache_salt
            and (rows := self._rows[session_id]) <= most
            and sequence.token_ids[:rows] == kept.token_ids[:rows]
        ]
        for session_id in redundant:
            self.forget(session_id)
        self.kept[sequence.session_id] = sequence
        while len(self.kept) > MAXIMUM_KEPT_SESSIONS:
            oldest = next(iter(self.kept))
            self.forget(oldest)
            redundant.append(oldest)
        return redundant

    def give_up(self, session_id: str) -> None:
        """Free a session if its rows are kept."""
        kept = self.kept.get(session_id)
        if kept is not None:
            self.release(session_id, kept.epoch)

    def give_up_kept(self, donors: Collection[str]) -> bool:
        """Free the longest-unused kept session that is not among `donors`. Returns False if there is none."""
        for session_id, kept in self.kept.items():
            if session_id not in donors:
                self.release(session_id, kept.epoch)
                return True
        return False

    def forget_kept(self) -> None:
        """Stop counting all kept sessions: some stage has lost their rows."""
        for session_id in list(self.kept):
            self.forget(session_id)

    def prefix_for(self, sequence: Sequence, running: Iterable[Sequence]) -> PrefixCopy | None:
        """Return the longest prefix of the sequence whose rows are on every stage; its last token is computed anyway.

        Running sequences count too: their steps so far reach every stage before the next one does.
        """
        most = len(sequence.token_ids) - 1
        best: PrefixCopy | None = None
        donors = [(kept, self._rows[kept.session_id]) for kept in self.kept.values()]
        donors += [(other, other.sent) for other in running]
        for donor, rows in donors:
            least = best.token_count + 1 if best else MINIMUM_PREFIX_TOKENS
            if donor is sequence or donor.request.cache_salt != sequence.request.cache_salt or min(rows, most) < least:
                continue
            count = common_prefix_length(sequence.token_ids, donor.token_ids, min(rows, most), least)
            if count >= least:
                best = PrefixCopy(donor.session_id, donor.epoch, count)
        if best is not None and best.session_id in self.kept:
            self.kept.move_to_end(best.session_id)
        return best


def common_prefix_length(left: list[int], right: list[int], most: int, least: int = 1) -> int:
    """Count how many of the first `most` items are equal; 0 if fewer than `least`. Compares slices, not items."""
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
