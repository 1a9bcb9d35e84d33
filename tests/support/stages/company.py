"""The logits of a whole model in every company: how its sessions' tokens are dealt out to steps, threads and slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.stage.executors.base import Span
from tests.support.stages.slice_pipeline import Logits, SlicePipeline

Tokens = npt.NDArray[np.int64]
Steps = list[list[tuple[int, int]]]  # of (session, tokens)


def in_chunks(number: int, length: int, chunk: int) -> Steps:
    """Steps of one session alone, `chunk` tokens each."""
    return [[(number, min(chunk, length - begin))] for begin in range(0, length, chunk)]


def in_company(lengths: Sequence[int], most: int, seed: int) -> Steps:
    """Random steps of several sessions: some decode, some prefill up to `most` tokens, some wait."""
    random = np.random.default_rng(seed)
    left = list(lengths)
    steps: Steps = []
    while any(left):
        step = []
        for number in random.permutation(len(left)):
            count = min(left[number], int(random.choice([0, 1, 1, int(random.integers(1, most + 1))])))
            if count:
                step.append((int(number), count))
                left[number] -= count
        if step:
            steps.append(step)
    return steps


class Company:
    """One model's sessions, each computed alone by one slice on one thread, to compare all else with."""

    def __init__(self, model: Path, layers: int, sessions: Sequence[Tokens], **options: Any) -> None:
        self._model, self._layers, self._sessions = model, layers, sessions
        self._options = {"executor": "ggml", **options}
        pipeline = self._pipeline((0, layers), 1)
        self.alone = [
            run(pipeline, sessions, [[(number, len(tokens))]])[number] for number, tokens in enumerate(sessions)
        ]

    def _pipeline(self, cuts: Sequence[int], threads: int) -> SlicePipeline:
        return SlicePipeline(self._model, cuts, **self._options, threads=threads)

    def check_chunks(self, chunk: int, threads: int = 1) -> None:
        """Each session alone, in chunks."""
        pipeline = self._pipeline((0, self._layers), threads)
        for number, tokens in enumerate(self._sessions):
            found = run(pipeline, self._sessions, in_chunks(number, len(tokens), chunk))[number]
            self._compare(number, found, f"chunks of {chunk}, {threads} threads")

    def check_company(self, cuts: Sequence[int], threads: int, seed: int, most: int = 70) -> None:
        """All sessions together, in random steps."""
        pipeline = self._pipeline(cuts, threads)
        found = run(pipeline, self._sessions, in_company([len(each) for each in self._sessions], most, seed))
        for number, each in enumerate(found):
            self._compare(number, each, f"company, slices {cuts}, {threads} threads, seed {seed}")

    def check_reused_beginning(self, kept: int, rest: int) -> None:
        """The first session's rows up to `kept` copied to another one, which continues in chunks of `rest`."""
        pipeline = self._pipeline((0, self._layers), 2)
        tokens = self._sessions[0]
        pipeline.step([Span("first", 0, kept, len(tokens))], tokens[:kept], [])
        for each in pipeline.slices:
            each.copy_rows("first", "second", kept, len(tokens))
        for begin in range(kept, len(tokens), rest):
            given = tokens[begin : begin + rest]
            found = pipeline.step([Span("second", begin, len(given), len(tokens))], given, range(len(given)))
            expected = self.alone[0][begin : begin + len(given)]
            same_bits(found, expected, f"{kept} tokens reused, then {rest} at once, from {begin} on")

    def _compare(self, number: int, found: Logits, how: str) -> None:
        same_bits(found, self.alone[number], f"session {number}, {how}")


def run(pipeline: SlicePipeline, sessions: Sequence[Tokens], steps: Steps) -> list[Logits]:
    """All logits of the sessions in these steps; sessions without steps have none. Their rows are freed afterwards."""
    found = pipeline.run(sessions, steps)
    pipeline.release(len(sessions))
    return found


def same_bits(found: Logits, expected: Logits, how: str) -> None:
    """Fail with the first row whose bits differ."""
    assert found.shape == expected.shape, how
    different = (found.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
    if different.any():
        row = int(different.argmax())
        error = np.abs(found[row] - expected[row]).max()
        raise AssertionError(f"{how}: {different.sum()} rows differ, first row {row}, by {error:.2g}")
