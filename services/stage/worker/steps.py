"""Checks a step against the plan, selects spans of it and packs it for the slice."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from msgspec.structs import replace

from noodle.cluster.plan import Plan
from noodle.errors import StepRefused
from noodle.wire.frames import MAXIMUM_STEP_TOKENS, ActivationTensor, checked_tensor
from noodle.wire.messages import SpanRefusal, Step, StepSpan, total_tokens
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.hidden_states import cast


def check_step(step: Step, body: memoryview, plan: Plan, index: int) -> None:
    """Check dtype, shape, length, positions and token ids of a step for the plan's stage `index` (design D5).

    Raises StepRefused, or WireError for a body that is not of the step's shape.
    """
    is_first = index == 0
    accepted = ("int32",) if is_first else plan.stages[index - 1].activation_dtypes
    if step.dtype not in accepted:
        raise StepRefused(
            f"The step's dtype is {step.dtype}, this stage takes {' or '.join(accepted)}.", reason="wrong_dtype"
        )
    tokens = total_tokens(step)
    expected = [tokens] if is_first else [tokens, plan.hidden_size]
    if step.shape != expected or tokens > MAXIMUM_STEP_TOKENS:
        raise StepRefused(
            f"The step has shape {step.shape}, its spans ask for {expected}; {MAXIMUM_STEP_TOKENS} tokens at most.",
            reason="wrong_shape",
        )
    tensor = checked_tensor(step.dtype, tuple(step.shape), body)
    for span in step.spans:
        _check_span(span, plan)
    if is_first and tokens:
        token_ids = tensor.data.cast("i")  # a decode step has a few: numpy's reductions would cost more
        if min(token_ids) < 0 or max(token_ids) >= plan.vocab_size:
            raise StepRefused(f"A token id is outside the vocabulary of {plan.vocab_size}.", reason="wrong_token")


def _check_span(span: StepSpan, plan: Plan) -> None:
    end = span.first_position + span.token_count
    if span.reserve_tokens > plan.context_length or end > span.reserve_tokens:
        raise StepRefused(
            f"A span ends at position {end} of a session of {span.reserve_tokens} tokens; "
            f"the context is {plan.context_length}.",
            reason="wrong_position",
        )
    scored = span.scored_token_ids
    if len(scored) > span.token_count or (scored and max(scored) >= plan.vocab_size):
        raise StepRefused(
            f"A span of {span.token_count} tokens asks for the scores of {len(scored)} tokens, each of which "
            f"must be in the vocabulary of {plan.vocab_size}.",
            reason="wrong_token",
        )


def select_spans(step: Step, body: memoryview, spans: Collection[StepSpan]) -> tuple[Step, memoryview]:
    """Return the step with only these of its spans, and their rows."""
    if len(spans) == len(step.spans):
        return step, body
    row_bytes = body.nbytes // total_tokens(step)
    chosen = {id(span) for span in spans}
    parts, row = [], 0
    for span in step.spans:
        if id(span) in chosen:
            parts.append(body[row * row_bytes : (row + span.token_count) * row_bytes])
        row += span.token_count
    shape = [sum(span.token_count for span in spans), *step.shape[1:]]
    return replace(step, spans=list(spans), shape=shape), memoryview(b"".join(parts))


def packed_batch(step: Step, body: memoryview, *, is_first: bool, is_last: bool) -> PackedBatch:
    """Pack a step for the slice; logits are asked for the last row of each span that wants a token."""
    spans, rows, end = [], [], 0
    for span in step.spans:
        spans.append(Span(span.session_id, span.first_position, span.token_count, span.reserve_tokens))
        end += span.token_count
        if is_last and span.sampling is not None:
            rows.append(end - 1)
    logits_rows = np.array(rows, np.int64)
    if is_first:
        return PackedBatch(tuple(spans), logits_rows, token_ids=np.frombuffer(body, np.int32).astype(np.int64))
    hidden = ActivationTensor(step.dtype, tuple(step.shape), body)
    if step.dtype == "int8":  # travels over hops only: no slice computes with it
        hidden = cast(hidden, "float32")
    return PackedBatch(tuple(spans), logits_rows, hidden_states=hidden)


def refusal_of(span: StepSpan, stage_id: int, reason: str, message: str) -> SpanRefusal:
    return SpanRefusal(
        session_id=span.session_id,
        session_epoch=span.session_epoch,
        first_position=span.first_position,
        stage_id=stage_id,
        reason=reason,
        message=message[:1990],
    )
