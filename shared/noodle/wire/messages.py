"""Every message that crosses a hop, typed and checked at decoding; knows their meaning, not how they travel.

Down the pipeline, each hop: Step, LiveSessions, KeepAlive.   Up again on the same connection: KeepAlive, HopRefused.
From the last stage to the coordinator: StepResult, KeepAlive.
By the queue, as entries of a stream: InlineStep, ActivationRef, LiveSessions, StepResult, KeepAlive.
Fields are only ever added, with a default (msgspec's rule for schema evolution); none changes its type.
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
MAXIMUM_INLINE_BYTES = 32 << 10  # the token ids of the largest step


MAXIMUM_TOP_LOGPROBS = 20
TopCount = Annotated[int, Meta(ge=0, le=MAXIMUM_TOP_LOGPROBS)]


class SamplingParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is drawn from the logits (design D3); temperature 0 is greedy."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0  # 0 is off
    seed: Seed = 0


class PrefixCopy(Struct, frozen=True):
    """Rows [0, token_count) of one session that are those of another, for the tokens are the same."""

    session_id: SessionId
    session_epoch: Version
    token_count: Annotated[int, Meta(ge=1, le=1 << 24)]


class ReleasedSession(Struct, frozen=True):
    """A session whose rows are to be freed, unless it has begun anew since."""

    session_id: SessionId
    session_epoch: Version


class StepSpan(Struct, frozen=True):
    """The tokens of one session in a step, in rows of the body in the order of the spans."""

    session_id: SessionId
    session_epoch: Version  # raised by each replay; older ones are dropped
    first_position: Count
    token_count: Annotated[int, Meta(ge=1, le=1 << 24)]
    reserve_tokens: Annotated[int, Meta(ge=1, le=1 << 31)]  # KV rows the session will need at most
    sampling: SamplingParameters | None = None  # set when the token after the last row is asked for
    logprob: bool = False  # also the log-probability of that token
    # Tokens that are known to follow the span's first rows, one each: their log-probabilities are asked for. A stage
    # behind the first sees no token ids, and the last of these is the first token of the next chunk.
    scored_token_ids: Annotated[list[Count], Meta(max_length=8192)] = []
    top_logprobs: TopCount = 0  # wherever a log-probability is asked for, also those of so many likeliest tokens
    prefix: PrefixCopy | None = None  # of a session's first span: what stands before its first position


class SpanRefusal(Struct, frozen=True):
    """A span that a stage did not compute; it travels on to the results, so that the coordinator hears of it."""

    session_id: SessionId
    session_epoch: Version
    first_position: Count
    stage_id: Count
    reason: ShortText
    message: ShortText


class StageTiming(Struct, frozen=True):
    """Where a step's time went on one stage, by that stage's own clock."""

    stage_id: Count
    waited_seconds: Seconds  # from the frame's arrival to the start of its computation
    computed_seconds: Seconds
    sent_seconds: Seconds = 0.0  # handing the step before this one to the next process


class Step(Struct, frozen=True, tag="step"):
    """Some tokens of some sessions on their trip through the pipeline. Body: `shape` items of `dtype`.

    Stage 0 gets int32 token ids [total_tokens], later stages hidden states [total_tokens, hidden_size].
    """

    step_id: Version
    plan_version: Version
    coordinator_epoch: Version
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[list[Count], Meta(max_length=2)]
    spans: Annotated[list[StepSpan], Meta(max_length=4096)]
    gap_seconds: Seconds = 5.0  # how long a stage may hold a span whose earlier tokens have not come
    timings: Annotated[list[StageTiming], Meta(max_length=1024)] = []
    refusals: Annotated[list[SpanRefusal], Meta(max_length=4096)] = []
    # freed on every stage before the spans are computed: what gave way to them
    released: Annotated[list[ReleasedSession], Meta(max_length=4096)] = []


class LiveSessions(Struct, frozen=True, tag="live"):
    """All sessions that may hold KV rows; `released` ones are freed at once, unlisted ones after a while.

    With `is_authoritative` these are freed at once too: the coordinator could not tell every end when it came.
    """

    plan_version: Version
    coordinator_epoch: Version
    sessions: Annotated[list[SessionId], Meta(max_length=65536)]
    released: Annotated[list[SessionId], Meta(max_length=65536)] = []
    is_authoritative: bool = False


class ChainLink(Struct, frozen=True):
    """One stage as those before it see it; `boot_id` changes when its process, and so its KV cache, is a new one.

    `losses` is told because frames may be lost between two connections, and that both ends are connected again tells
    nothing of it.
    """

    stage_id: Count
    boot_id: Annotated[str, Meta(max_length=64)]
    plan_version: Version
    next_link_up: bool  # always true on the last stage
    detail: ShortText = ""
    by_queue: bool = False  # the next stage is only reached by the queue now
    losses: Count = 0  # how often the connection to the next stage was lost, and with it perhaps a step on its way


class KeepAlive(Struct, frozen=True, tag="alive"):
    """Sent each second when nothing else is; upwards it carries the state of this stage and of all behind it.

    One that carries a number down a hop is answered at once by one with that number: so the hop's round trip is known.
    """

    chain: Annotated[list[ChainLink], Meta(max_length=1024)] = []
    echo: Version = 0  # 0 asks for nothing


class HopRefused(Struct, frozen=True, tag="refused"):
    """Said to the sender of a frame that could not be taken; the connection closes after it."""

    stage_id: Count
    reason: ShortText
    message: ShortText


class TokenLogprob(Struct, frozen=True, array_like=True):
    """A token and its log-probability by the raw logits."""

    token_id: Count
    logprob: float


class TokenScore(Struct, frozen=True, array_like=True):
    """The log-probability of one token that is known, and the likeliest tokens at its place, likeliest first."""

    logprob: float
    top: Annotated[list[TokenLogprob], Meta(max_length=MAXIMUM_TOP_LOGPROBS)] = []


class SpanResult(Struct, frozen=True):
    """A span that every stage has computed, and the token sampled after it if one was asked for."""

    session_id: SessionId
    session_epoch: Version
    first_position: Count
    token_count: Count
    token_id: Count | None = None
    logprob: float | None = None
    top: Annotated[list[TokenLogprob], Meta(max_length=MAXIMUM_TOP_LOGPROBS)] = []  # at the sampled token's place
    scores: Annotated[list[TokenScore], Meta(max_length=8192)] = []  # of the span's scored_token_ids


class StepResult(Struct, frozen=True, tag="result"):
    """What comes back from the last stage; a step may be answered in parts."""

    step_id: Version
    plan_version: Version
    coordinator_epoch: Version
    spans: Annotated[list[SpanResult], Meta(max_length=4096)]
    refusals: Annotated[list[SpanRefusal], Meta(max_length=4096)]
    timings: Annotated[list[StageTiming], Meta(max_length=1024)]


class InlineStep(Struct, frozen=True, tag="inline"):
    """A step whose body is small and no activations: token ids for stage 0, or none when only refusals travel on."""

    step: Step
    body: Annotated[bytes, Meta(max_length=MAXIMUM_INLINE_BYTES)] = b""


class ActivationRef(Struct, frozen=True, tag="reference"):
    """A step whose body the stage before keeps in its outbox until this one fetches it from there."""

    step: Step
    url: Annotated[str, Meta(max_length=300)]  # of the stage that keeps it; any other than the plan's is refused
    activation_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    byte_count: Annotated[int, Meta(ge=1, le=1 << 40)]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]  # of the bytes, by `noodle.wire.frames.body_digest`


HopMessage = Step | LiveSessions | KeepAlive | HopRefused | StepResult
QueueEntry = InlineStep | ActivationRef | LiveSessions | StepResult | KeepAlive


def total_tokens(step: Step) -> int:
    """Rows of the step's body."""
    return sum(span.token_count for span in step.spans)
