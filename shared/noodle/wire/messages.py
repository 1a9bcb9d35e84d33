"""Every message that crosses a hop, typed and checked at decoding.

Down the pipeline, on each hop: Step, LiveSessions, KeepAlive. Up the same connection: KeepAlive, HopRefused.
From the last stage to the coordinator: StepResult, KeepAlive.
Through the queue, as stream entries: InlineStep, ActivationRef, LiveSessions, StepResult, KeepAlive.
Fields are only added, with a default, and never change their type (msgspec's rule for schema evolution).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

SessionId = Annotated[str, Meta(min_length=1, max_length=64)]
Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Version = Annotated[int, Meta(ge=0, le=1 << 53)]
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0)]
ShortText = Annotated[str, Meta(max_length=2000)]
MAXIMUM_INLINE_BYTES = 32 << 10  # largest body of an InlineStep: the token ids of the largest step
MAXIMUM_TOP_LOGPROBS = 20  # most alternatives per token with their log-probabilities
TopCount = Annotated[int, Meta(ge=0, le=MAXIMUM_TOP_LOGPROBS)]


class SamplingParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is sampled from the logits (design D3); temperature 0 is greedy."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0  # 0 is off
    seed: Seed = 0


class PrefixCopy(Struct, frozen=True):
    """Rows [0, token_count) to copy from another session, whose tokens are the same."""

    session_id: SessionId
    session_epoch: Version
    token_count: Annotated[int, Meta(ge=1, le=1 << 24)]


class ReleasedSession(Struct, frozen=True):
    """A session whose rows are freed, unless it has restarted under a later epoch."""

    session_id: SessionId
    session_epoch: Version


class StepSpan(Struct, frozen=True):
    """The tokens of one session in a step; the body has their rows in the order of the spans."""

    session_id: SessionId
    session_epoch: Version  # raised by each replay; older spans are dropped
    first_position: Count
    token_count: Annotated[int, Meta(ge=1, le=1 << 24)]
    reserve_tokens: Annotated[int, Meta(ge=1, le=1 << 31)]  # most KV rows that the session will need
    sampling: SamplingParameters | None = None  # set to sample the token after the last row
    logprob: bool = False  # also return the log-probability of that token
    # The tokens that follow the span's first rows, one each, to return their log-probabilities. Stages after the first
    # see no token ids, and the last of these is the first token of the next chunk.
    scored_token_ids: Annotated[list[Count], Meta(max_length=8192)] = []
    top_logprobs: TopCount = 0  # likeliest tokens to return with each log-probability
    prefix: PrefixCopy | None = None  # of a first span: the rows before its first position


class SpanRefusal(Struct, frozen=True):
    """A span that a stage did not compute; it travels on with the step to the coordinator."""

    session_id: SessionId
    session_epoch: Version
    first_position: Count
    stage_id: Count
    reason: ShortText
    message: ShortText


class StageTiming(Struct, frozen=True):
    """A step's time on one stage, by that stage's clock."""

    stage_id: Count
    waited_seconds: Seconds  # from the arrival of the frame to the start of its computation
    computed_seconds: Seconds
    sent_seconds: Seconds = 0.0  # sending the previous step to the next process


class Step(Struct, frozen=True, tag="step"):
    """Tokens of sessions on their way through the pipeline. Body: `shape` items of `dtype`.

    Stage 0 receives int32 token ids [total_tokens], later stages hidden states [total_tokens, hidden_size].
    """

    step_id: Version
    plan_version: Version
    coordinator_epoch: Version
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[list[Count], Meta(max_length=2)]
    spans: Annotated[list[StepSpan], Meta(max_length=4096)]
    gap_seconds: Seconds = 5.0  # how long a stage holds a span until its earlier tokens arrive
    timings: Annotated[list[StageTiming], Meta(max_length=1024)] = []
    refusals: Annotated[list[SpanRefusal], Meta(max_length=4096)] = []
    # preempted sessions, freed on every stage before the spans are computed
    released: Annotated[list[ReleasedSession], Meta(max_length=4096)] = []


class LiveSessions(Struct, frozen=True, tag="live"):
    """All sessions that may hold KV rows; `released` ones are freed at once, unlisted ones after a grace period.

    With `is_authoritative` unlisted ones are freed at once too: the coordinator may have missed the end of some.
    """

    plan_version: Version
    coordinator_epoch: Version
    sessions: Annotated[list[SessionId], Meta(max_length=65536)]
    released: Annotated[list[SessionId], Meta(max_length=65536)] = []
    is_authoritative: bool = False


class ChainLink(Struct, frozen=True):
    """State of one stage for the stages before it; a new `boot_id` means a new process with an empty KV cache.

    `losses` counts lost connections: frames may be lost between two of them, which a restored connection hides.
    """

    stage_id: Count
    boot_id: Annotated[str, Meta(max_length=64)]
    plan_version: Version
    next_link_up: bool  # true on the last stage
    detail: ShortText = ""
    by_queue: bool = False  # only the queue reaches the next stage now
    losses: Count = 0  # of the connection to the next stage


class KeepAlive(Struct, frozen=True, tag="alive"):
    """Sent once a second when nothing else is; upstream it carries the state of this stage and of all after it.

    A stage answers an `echo` number at once with the same number, which gives the round trip of the hop.
    """

    chain: Annotated[list[ChainLink], Meta(max_length=1024)] = []
    echo: Version = 0  # 0: none


class HopRefused(Struct, frozen=True, tag="refused"):
    """Answer to a frame that is refused; the connection closes after it."""

    stage_id: Count
    reason: ShortText
    message: ShortText


class TokenLogprob(Struct, frozen=True, array_like=True):
    """A token and its log-probability from the raw logits."""

    token_id: Count
    logprob: float


class TokenScore(Struct, frozen=True, array_like=True):
    """The log-probability of a known token, and the likeliest tokens at its position, likeliest first."""

    logprob: float
    top: Annotated[list[TokenLogprob], Meta(max_length=MAXIMUM_TOP_LOGPROBS)] = []


class SpanResult(Struct, frozen=True):
    """A span that every stage has computed, and the token sampled after it, if requested."""

    session_id: SessionId
    session_epoch: Version
    first_position: Count
    token_count: Count
    token_id: Count | None = None
    logprob: float | None = None
    top: Annotated[list[TokenLogprob], Meta(max_length=MAXIMUM_TOP_LOGPROBS)] = []  # at the sampled token's position
    scores: Annotated[list[TokenScore], Meta(max_length=8192)] = []  # of the span's scored_token_ids


class StepResult(Struct, frozen=True, tag="result"):
    """The answer of the last stage; a step may be answered in parts."""

    step_id: Version
    plan_version: Version
    coordinator_epoch: Version
    spans: Annotated[list[SpanResult], Meta(max_length=4096)]
    refusals: Annotated[list[SpanRefusal], Meta(max_length=4096)]
    timings: Annotated[list[StageTiming], Meta(max_length=1024)]


class InlineStep(Struct, frozen=True, tag="inline"):
    """A step with a small body: token ids for stage 0, or none when only refusals travel on."""

    step: Step
    body: Annotated[bytes, Meta(max_length=MAXIMUM_INLINE_BYTES)] = b""


class ActivationRef(Struct, frozen=True, tag="reference"):
    """A step whose body waits in the outbox of the previous stage until this stage fetches it."""

    step: Step
    url: Annotated[str, Meta(max_length=300)]  # of that stage; refused unless the plan has it
    activation_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    byte_count: Annotated[int, Meta(ge=1, le=1 << 40)]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]  # `noodle.wire.frames.body_digest` of the bytes


HopMessage = Step | LiveSessions | KeepAlive | HopRefused | StepResult
QueueEntry = InlineStep | ActivationRef | LiveSessions | StepResult | KeepAlive


def total_tokens(step: Step) -> int:
    return sum(span.token_count for span in step.spans)
