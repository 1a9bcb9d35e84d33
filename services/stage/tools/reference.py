"""Compares what a cluster generated with the unsplit model, computed by the cluster's own executors in one process.

A process for `noodle verify` (`python -m services.stage.tools.reference`): it reads a ReferenceQuestion from standard
input and writes ReferenceLines to standard output, the last one with the results (noodle/cluster/measuring.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from noodle.cluster.measuring import (
    Difference,
    GreedyAnswer,
    ProcessError,
    PromptResult,
    ReferenceLine,
    ReferencePart,
    ReferenceQuestion,
)
from noodle.config.cores import usable_cores
from noodle.errors import NoodleError
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by

CHUNK_TOKENS = 512  # computed in one step
SESSION = "reference"

Compare = Callable[[ReferenceQuestion, Callable[[int], None]], list[PromptResult]]


def main(compare: Compare) -> int:
    """Compare; after an error the last line describes it and the exit status is 1."""
    try:
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=ReferenceQuestion)
        results = compare(question, lambda done: write_line(ReferenceLine(compared=done)))
    except NoodleError as error:
        write_line(ReferenceLine(error=ProcessError(error.message, error.cure)))
        return 1
    write_line(ReferenceLine(results=tuple(results)))
    return 0


def compare_with_parts(question: ReferenceQuestion, compared: Callable[[int], None]) -> list[PromptResult]:
    """Compute each prompt with its tokens by the parts; `compared` receives the number of finished prompts.

    Raises NoodleError if a part cannot be loaded here.
    """
    slices = [_load(question, part) for part in question.parts]
    compared(0)
    results = []
    for answer in question.answers:
        results.append(compare_logits(logits_of(slices, answer), answer))
        compared(len(results))
    return results


def logits_of(slices: Sequence[ModelSlice], answer: GreedyAnswer) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocab_size] of each new token, computed from the cluster's tokens before it."""
    token_ids = np.array([*answer.prompt_ids, *answer.token_ids[:-1]], np.int64)
    first_row = len(token_ids) - len(answer.token_ids)
    found = []
    for begin in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[begin : begin + CHUNK_TOKENS]
        spans = (Span(SESSION, begin, len(chunk), len(token_ids)),)
        rows = np.arange(max(first_row - begin, 0), len(chunk), dtype=np.int64)
        batch = PackedBatch(spans, np.zeros(0, np.int64) if len(slices) > 1 else rows, token_ids=chunk)
        output = slices[0].forward(batch)
        for index, model_slice in enumerate(slices[1:], start=2):
            wanted = rows if index == len(slices) else np.zeros(0, np.int64)
            output = model_slice.forward(PackedBatch(spans, wanted, hidden_states=output.hidden_states))
        if output.logits is not None and len(rows):
            found.append(output.logits.copy())
    for model_slice in slices:
        model_slice.release(SESSION)
    return np.concatenate(found)


def compare_logits(logits: npt.NDArray[np.float32], answer: GreedyAnswer) -> PromptResult:
    """Compare each new token of an answer with the reference's logits [tokens, vocab_size] there."""
    count = len(answer.token_ids)
    values = logits.astype(np.float64)
    order = np.arange(count)
    chosen = values[order, answer.token_ids]
    highest = values.max(axis=1)
    logprobs = chosen - highest - np.log(np.exp(values - highest[:, None]).sum(axis=1))
    second, best = np.partition(values, -2, axis=1)[:, -2:].T
    gaps = best - chosen
    # two tokens with exactly the best logit are both the most likely
    differences = tuple(
        Difference(
            index=int(index),
            token_id=answer.token_ids[index],
            best_token_id=int(values[index].argmax()),
            logit_gap=float(gaps[index]),
            two_best_gap=float(best[index] - second[index]),
        )
        for index in np.flatnonzero(gaps > 0)
    )
    error = float(np.abs(logprobs - np.array(answer.logprobs)).max())
    return PromptResult(len(answer.prompt_ids), count, error, differences)


def _load(question: ReferenceQuestion, part: ReferencePart) -> ModelSlice:
    return load_by(
        Candidate(part.executor, part.weights, part.kv_dtype, part.dtype),
        Path(question.model),
        part.start_layer,
        part.end_layer,
        device="cpu",
        threads=question.threads or usable_cores(),
        context_length=question.context_length,
        cache_dir=Path(question.cache_dir) if question.cache_dir else None,
    )


def write_line(value: object) -> None:
    """Write a value as a line of JSON to standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(compare_with_parts))
