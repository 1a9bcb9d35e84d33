"""What the scheduler works on: sequences, those that wait, steps in flight and the limits of the active plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from noodle.wire.messages import PrefixCopy, SamplingParameters, Step, TokenScore
from services.coordinator.engine.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request as the scheduler computes it. `token_ids` are the prompt and all generated tokens, never lost.

    Stages know it as the session `session_id`. Each replay raises `epoch`, and results of older epochs are ignored.
    """

    request: Request
    end_token_ids: frozenset[int] = frozenset()  # of the model; ignored if the request ignores the end of text
    token_ids: list[int] = field(init=False)
    session_id: str = field(init=False)
    prompt_length: int = field(init=False)
    reserve_tokens: int = field(init=False)  # KV rows that it needs at most
    sampling: SamplingParameters = field(init=False)
    scores: list[TokenScore | None] | None = field(init=False)  # of the prompt from its second token on, if wanted
    epoch: int = 1
    sent: int = 0  # tokens that steps of this epoch have taken, or whose rows were there before
    chunk_ends: tuple[int, ...] = ()  # where this epoch's prompt is cut, chosen when its first chunk goes
    in_flight: int = 0  # spans of this epoch that are not back
    replays: int = 0  # since the last new token
    finished: bool = False  # it has its last token and waits to be removed
    arrived: int = 0  # its place in the order of arrival, from 1
    admitted: int = 0  # its place in the order of admission
    reuses_prefix: bool = True  # False once a stage did not have the rows to copy
    prefix: PrefixCopy | None = None  # rows that stages copy instead of computing them, until they are sent

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        self.session_id = request.request_id
        self.prompt_length = len(self.token_ids)
        self.reserve_tokens = self.prompt_length + request.max_new_tokens
        self.sampling = request.sampling
        self.scores = [None] * (self.prompt_length - 1) if request.score_prompt else None
        if request.ignore_eos:
            self.end_token_ids = frozenset()

    @property
    def scores_are_complete(self) -> bool:
        return self.scores is None or None not in self.scores

    def tokens_to_score(self, first: int, end: int) -> list[int]:
        """Return the known tokens after rows [first, end) if the log-probability of one of them is still wanted.

        A row scores the token after it: the last row of a chunk scores the first token of the next one.
        """
        if self.scores is None or None not in self.scores[first:end]:
            return []
        return self.token_ids[first + 1 : min(end + 1, self.prompt_length)]

    @property
    def decodes(self) -> bool:
        """Whether its prompt is computed, or on its way to be."""
        return not self.finished and 0 < len(self.token_ids) - 1 <= self.sent

    def is_younger_than(self, other: Sequence) -> bool:
        """Whether it is preempted before the other when room runs out."""
        return (self.request.priority, self.admitted) > (other.request.priority, other.admitted)

    @property
    def wants_decode(self) -> bool:
        """Whether exactly its newest token is to be computed next."""
        return not self.finished and self.in_flight == 0 and self.sent == len(self.token_ids) - 1 and self.sent > 0

    @property
    def wants_prefill(self) -> bool:
        """Whether known tokens are still to be computed, including a single last token of a replay."""
        left = len(self.token_ids) - self.sent
        return not self.finished and left > 0 and not (self.sent > 0 and left == 1)


class WaitingQueue:
    """Sequences without a place: by priority, then the client with the fewest running, then by arrival."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(sorted(self._sequences.values(), key=lambda each: (each.request.priority, each.arrived)))

    def add(self, sequence: Sequence) -> None:
        """Add a sequence behind its client's others of the same priority; one that lost its place where it was."""
        if not sequence.arrived:
            self._arrivals += 1
            sequence.arrived = self._arrivals
        self._sequences[sequence.session_id] = sequence

    def remove(self, session_id: str) -> None:
        """Remove a sequence if it waits."""
        self._sequences.pop(session_id, None)

    def next(self, running_by_client: Mapping[str, int]) -> Sequence | None:
        """Return the sequence whose turn it is. One that needs less room never overtakes a long one.

        Clients take turns by what they have running, so that one with many requests does not keep the others waiting.
        """
        return min(
            self._sequences.values(),
            key=lambda each: (
                each.request.priority, running_by_client.get(each.request.client_name, 0), each.arrived
            ),
            default=None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What the active plan allows."""

    plan_version: int
    stage_count: int
    kv_tokens: int  # that fit on the tightest stage
    context_length: int
    decode_seconds: float  # predicted for one token through the pipeline
    prefill_seconds_per_token: float
    reserved_kv_tokens: int | None = None  # the same, on stages that reserve all rows of a session at its start


@dataclass(slots=True, kw_only=True)
class InFlightStep:
    """A step on its way, kept whole so that it can be sent again after a lost connection."""

    step: Step
    body: bytes
    sent_at: float
    deadline: float
    decodes: bool  # some of its spans are the newest token of a sequence
    epochs: dict[str, int]  # by session id, of spans that are not back

    @property
    def is_decode(self) -> bool:
        """Whether each of its spans is one token, without a chunk of a prompt."""
        return len(self.step.spans) == self.step.shape[0]

    @property
    def mean_rows(self) -> float:
        """Mean number of KV rows that a token of the step attends to."""
        rows = sum((span.first_position + span.token_count / 2) * span.token_count for span in self.step.spans)
        return rows / self.step.shape[0]
