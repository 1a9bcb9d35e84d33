"""The last stage's results for a step: sampled tokens and log-probabilities.

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
    """Return one result a span: the sampled token if one was asked for (design D3), and scores of known tokens.

    `logits` has a row for each span that asks for a token; the slice's last `forward` was this step. A span whose
    logits are not finite is returned with its error instead: the others are not affected.
    """
    results: list[SpanResult] = []
    failures: list[tuple[StepSpan, GenerationFailed]] = []
    logits_row = first_row = 0
    for span in step.spans:
        row = None
        if span.sampling is not None and logits is not None:
            row, logits_row = logits[logits_row], logits_row + 1
        try:
            results.append(_span_result(span, row, first_row, model_slice))
        except GenerationFailed as error:
            failures.append((span, error))
        first_row += span.token_count
    return results, failures


def _span_result(
    span: StepSpan, logits: npt.NDArray[np.float32] | None, first_row: int, model_slice: ModelSlice
) -> SpanResult:
    token_id, logprob, top = None, None, []
    if span.sampling is not None:
        if logits is None:
            raise GenerationFailed("The slice returned no logits for a step that asks for tokens.")
        position = span.first_position + span.token_count
        token_id, logprob = sample(logits, span.sampling, position, with_logprob=span.logprob)
        if span.logprob:
            top = likeliest(logits, span.top_logprobs)
    return SpanResult(
        session_id=span.session_id,
        session_epoch=span.session_epoch,
        first_position=span.first_position,
        token_count=span.token_count,
        token_id=token_id,
        logprob=logprob,
        top=top,
        scores=_scores(model_slice, first_row, span.scored_token_ids, span.top_logprobs),
    )


def _scores(model_slice: ModelSlice, first_row: int, token_ids: list[int], top: int) -> list[TokenScore]:
    """Scores of the tokens that follow the packed rows from `first_row` on."""
    scores: list[TokenScore] = []
    for begin in range(0, len(token_ids), SCORED_ROWS):
        piece = token_ids[begin : begin + SCORED_ROWS]
        rows = np.arange(first_row + begin, first_row + begin + len(piece), dtype=np.int64)
        scores += score(model_slice.logits_of(rows), piece, top)
    return scores
