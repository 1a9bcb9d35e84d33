"""What the last stage answers for a step: drawn tokens and log-probabilities; knows logits, no connection, no text.

Scored rows are turned into logits a piece at a time: those of a whole prompt would be tokens x vocabulary x 4 bytes
(400 MB for 2,000 tokens of a vocabulary of 49,152).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed
from noodle.wire.messages import SpanResult, Step, StepSpan, TokenScore
from services.stage.executors.base import ModelSlice
from services.stage.worker.logprobs import likeliest, score
from services.stage.worker.sampler import sample

SCORED_ROWS = 64  # whose logits are held at the same time


def span_results(
    step: Step, logits: npt.NDArray[np.float32] | None, model_slice: ModelSlice
) -> tuple[list[SpanResult], list[tuple[StepSpan, GenerationFailed]]]:
    """One result a span: the token drawn where one was asked for (design D3), and the scores of known tokens.

    `logits` has a row for each span that asks for a token; the slice's last `forward` was this step. A span whose
    logits are not numbers comes back with that error instead: it says nothing of the others.
    """
    results: list[SpanResult] = []
    failures: list[tuple[StepSpan, GenerationFailed]] = []
    sampled_row = first_row = 0
    for span in step.spans:
        row, sampled_row = sampled_row, sampled_row + (span.sampling is not None)
        try:
            results.append(_span_result(span, logits, row, first_row, model_slice))
        except GenerationFailed as error:
            failures.append((span, error))
        first_row += span.token_count
    return results, failures


def _span_result(
    span: StepSpan, logits: npt.NDArray[np.float32] | None, row: int, first_row: int, model_slice: ModelSlice
) -> SpanResult:
    token_id, logprob, top = None, None, []
    if span.sampling is not None:
        if logits is None:
            raise GenerationFailed("The slice gave no logits for a step that asks for tokens.")
        position = span.first_position + span.token_count
        token_id, logprob = sample(logits[row], span.sampling, position, with_logprob=span.logprob)
        if span.logprob:
            top = likeliest(logits[row], span.top_logprobs)
    scores = _scores(model_slice, first_row, span.scored_token_ids, span.top_logprobs)
    return SpanResult(
        span.session_id, span.session_epoch, span.first_position, span.token_count, token_id, logprob, top, scores
    )


def _scores(model_slice: ModelSlice, first_row: int, token_ids: list[int], top: int) -> list[TokenScore]:
    """Of the tokens that follow the packed axis's rows from `first_row` on."""
    scores: list[TokenScore] = []
    for begin in range(0, len(token_ids), SCORED_ROWS):
        piece = token_ids[begin : begin + SCORED_ROWS]
        rows = np.arange(first_row + begin, first_row + begin + len(piece), dtype=np.int64)
        scores += score(model_slice.logits_of(rows), piece, top)
    return scores
