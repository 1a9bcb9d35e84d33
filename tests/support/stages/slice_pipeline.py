"""A pipeline of real slices in one process, and the unsplit model of transformers to compare it with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.stage.executors.base import PackedBatch, Span
from tests.support.stages.executors import load_exact

Logits = npt.NDArray[np.float32]

# steps of (session, tokens): a whole prompt; a chunk after the first beside a new prompt; decode, chunk and prompt
# mixed; a long chunk beside a decode; decode alone
STEPS = [[(0, 11)], [(0, 5), (1, 8)], [(1, 1), (0, 6), (2, 3)], [(2, 10), (0, 1)], [(2, 1)]]


class SlicePipeline:
    """Slices of one model, cut at `cuts` (from 0 to the layer count), each fed by the previous one."""

    def __init__(
        self, folder: Path, cuts: Sequence[int], *, executor: str | Sequence[str] = "transformers", **options: Any
    ) -> None:
        executors = itertools.repeat(executor) if isinstance(executor, str) else executor
        self.slices = [
            load_exact(each, folder, start, end, **options)
            for each, (start, end) in zip(executors, itertools.pairwise(cuts), strict=False)
        ]

    def step(self, spans: Sequence[Span], token_ids: npt.NDArray[np.int64], logits_rows: Sequence[int]) -> Logits:
        """Compute one batch; return logits `[rows, vocab_size]`."""
        rows = np.array(logits_rows, np.int64)
        batch = PackedBatch(tuple(spans), rows, token_ids=token_ids)
        for each in self.slices:
            output = each.forward(batch)
            batch = PackedBatch(tuple(spans), rows, hidden_states=output.hidden_states)
        assert output.logits is not None
        return output.logits

    def run(
        self, sessions: Sequence[npt.NDArray[np.int64]], steps: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Logits]:
        """Return all logits of every session, with tokens fed in the given steps; one without steps has none."""
        lengths = [0] * len(sessions)
        parts: list[list[Logits]] = [[] for _ in sessions]
        for step in steps:
            spans = [Span(f"session {i}", lengths[i], count, len(sessions[i])) for i, count in step]
            token_ids = np.concatenate([sessions[i][lengths[i] : lengths[i] + count] for i, count in step])
            logits = self.step(spans, token_ids, range(len(token_ids)))
            begin = 0
            for i, count in step:
                parts[i].append(logits[begin : begin + count])
                lengths[i] += count
                begin += count
        return [np.concatenate(part) if part else np.empty((0, 0), np.float32) for part in parts]

    def release(self, sessions: int) -> None:
        """Free the rows of the sessions that `run` computed."""
        for each in self.slices:
            for number in range(sessions):
                each.release(f"session {number}")


def random_sessions(lengths: Sequence[int], vocab_size: int = 199, seed: int = 5) -> list[npt.NDArray[np.int64]]:
    """Return random token ids for sessions of the given lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(3, vocab_size, length) for length in lengths]


def unsplit_logits(folder: Path, sessions: Sequence[npt.NDArray[np.int64]], attention: str = "eager") -> list[Logits]:
    """Return all logits of every session from the model of transformers, one session at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy() for tokens in sessions]


def relative_difference(got: Sequence[Logits], expected: Sequence[Logits]) -> float:
    """Return the largest difference of logits, relative to the largest expected one."""
    return max(float(np.abs(g - e).max() / np.abs(e).max()) for g, e in zip(got, expected, strict=True))
