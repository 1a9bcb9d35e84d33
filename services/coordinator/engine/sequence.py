"""What the scheduler knows: a session, a step on its way, and what the active plan allows; values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from noodle.wire.messages import PrefixCopy, SamplingParameters, Step, TokenLogprob, TokenScore

FinishReason = Literal["eos", "length"]


@dataclass(slots=True, eq=False)
class Session:
    """One sequence being generated. `token_ids` are the prompt and everything generated, and are never lost."""

    session_id: str
    token_ids: list[int]
    prompt_length: int
    maximum_new_tokens: int
    sampling: SamplingParameters
    end_token_ids: frozenset[int]  # empty when the end of text is ignored
    want_logprob: bool = False
    top_logprobs: int = 0
    scores: list[TokenScore | None] | None = None  # of the prompt's tokens from its second on, where they are wanted
    epoch: int = 1
    sent: int = 0  # tokens that steps of this epoch have taken, or that were there before
    chunk_ends: tuple[int, ...] = ()  # where this epoch's prompt is cut, chosen when its first chunk goes
    in_flight: int = 0  # spans of this epoch that have not come back
    replays: int = 0  # since the last new token
    finished: bool = False  # it has its last token and only waits to be removed
    client_name: str = ""
    priority: int = 0  # lower ones are served first
    arrival: int = 0  # when it came, in the order of all
    admitted: int = 0  # when it got its place, in the order of all
    cache_salt: str = ""  # only sessions with the same one copy rows of one another
    copies_rows: bool = True  # of others that begin alike; not again once a stage did not have them
    prefix: PrefixCopy | None = None  # rows that stages copy instead of computing them, until they are sent

    @property
    def reserve_tokens(self) -> int:
        """KV rows it will need at most."""
        return self.prompt_length + self.maximum_new_tokens

    @property
    def scores_are_complete(self) -> bool:
        """Whether every log-probability of the prompt that is wanted has come."""
        return self.scores is None or None not in self.scores

    def tokens_to_score(self, first: int, end: int) -> list[int]:
        """The known tokens after rows [first, end), where the log-probability of one of them is still wanted.

        A row scores the token after it: the last row of a chunk scores the first token of the next one.
        """
        if self.scores is None or None not in self.scores[first:end]:
            return []
        return self.token_ids[first + 1 : min(end + 1, self.prompt_length)]

    @property
    def decodes(self) -> bool:
        """Whether its prompt is computed, or on its way to be."""
        return not self.finished and 0 < len(self.token_ids) - 1 <= self.sent

    def is_younger_than(self, other: Session) -> bool:
        """Whether it gives way to the other when room runs out."""
        return (self.priority, self.admitted) > (other.priority, other.admitted)

    @property
    def wants_decode(self) -> bool:
        """Whether exactly its newest token is to be computed next."""
        return not self.finished and self.in_flight == 0 and self.sent == len(self.token_ids) - 1 and self.sent > 0

    @property
    def wants_prefill(self) -> bool:
        """Whether known tokens are still to be computed; a lone last token of a replay counts too."""
        left = len(self.token_ids) - self.sent
        return not self.finished and left > 0 and not (self.sent > 0 and left == 1)


@dataclass(slots=True)
class InFlightStep:
    """A step on its way: kept whole, so that it can be sent again after a cut connection."""

    step: Step
    body: bytes
    sent_at: float
    deadline: float
    decodes: bool = False  # some of its spans are the newest token of a session
    sessions: dict[str, int] = field(default_factory=dict)  # session id to epoch, of spans that are not back

    @property
    def is_decode(self) -> bool:
        """Whether it has one token of each of its sessions, and no chunk of a prompt."""
        return len(self.step.spans) == self.step.shape[0]

    @property
    def mean_rows(self) -> float:
        """KV rows that a token of the step attends to, as a mean over them."""
        rows = sum((span.first_position + span.token_count / 2) * span.token_count for span in self.step.spans)
        return rows / self.step.shape[0]


@dataclass(frozen=True, slots=True)
class NewToken:
    """One more token of a session, and whether it was the last.

    A session that asks for no new token ends with one NewToken whose `token_id` is None: its prompt is computed.
    """

    session: Session
    token_id: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What the active plan allows."""

    plan_version: int
    stage_count: int
    kv_tokens: int  # that fit on the tightest stage
    context_length: int
    decode_seconds: float  # predicted for one token through the pipeline
    prefill_seconds_per_token: float
    reserved_kv_tokens: int | None = None  # that fit on stages which hold a session's whole reservation from its start
