"""Times steps of a real slice: any number of sessions, tokens and KV rows, with or without embedding and head."""

from __future__ import annotations

import time

import numpy as np
import torch

from noodle.wire.frames import ActivationTensor
from noodle.wire.messages import SamplingParameters
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.hidden_states import encode
from services.stage.executors.transformers.slice import TransformersSlice
from services.stage.worker.sampler import sample

CACHE_BYTES = 128 << 20  # written before a step: a slice's layers come from memory, not from the processor's cache
SAMPLING = SamplingParameters(temperature=0.8, top_p=0.95)


class SliceTimer:
    """A slice that is its own, with sessions that reserve `reserve_tokens` rows each; one thread at a time uses it."""

    def __init__(self, model_slice: ModelSlice, *, device: str, reserve_tokens: int) -> None:
        self.slice = model_slice
        self._device = device
        self.reserve_tokens = reserve_tokens  # of sessions that are seen from now on
        self._random = np.random.default_rng(0)
        self._unused = np.zeros(CACHE_BYTES, np.uint8) if device == "cpu" else None

    def fill_rows(self, sessions: int, tokens: int) -> None:
        """Give sessions rows 0 to `tokens` without computing them: noise, which takes as long to attend to."""
        if not isinstance(self.slice, TransformersSlice):
            raise ValueError("only transformers' rows can be filled with noise")
        for session in range(sessions):
            self.step_seconds(1, 1, first_position=0, first_session=session)
            self.slice.fill_rows_with_noise(_session_id(session), tokens)

    def step_seconds(
        self,
        sessions: int,
        tokens: int,
        *,
        first_position: int,
        sampled: bool = False,
        embedded: bool = True,
        first_session: int = 0,
    ) -> float:
        """Seconds of a step of `tokens` of each session, from hidden states unless the slice can embed and is to.

        `sampled` computes logits for the last token of each session, and draws from them. Rows that were there before
        are computed again into the same place.
        """
        spans = tuple(
            Span(_session_id(first_session + session), first_position, tokens, self.reserve_tokens)
            for session in range(sessions)
        )
        rows = np.arange(1, sessions + 1, dtype=np.int64) * tokens - 1 if sampled else np.zeros(0, np.int64)
        if self.slice.is_first and embedded:
            ids = self._random.integers(0, self.slice.vocab_size, sessions * tokens)
            batch = PackedBatch(spans, rows, token_ids=ids)
        else:
            batch = PackedBatch(spans, rows, hidden_states=self._hidden_states(sessions * tokens))
        if self._unused is not None:
            self._unused += 1
        start_seconds = time.perf_counter()
        output = self.slice.forward(batch)
        if sampled and output.logits is not None:
            for row in output.logits:
                sample(row, SAMPLING, first_position, False)
        if self._device == "cuda":
            torch.cuda.synchronize()  # a last slice that was asked for no logits has brought nothing back yet
        return time.perf_counter() - start_seconds

    def _hidden_states(self, tokens: int) -> ActivationTensor:
        values = self._random.standard_normal((tokens, self.slice.hidden_size), np.float32)
        return encode(values, self.slice.dtype)


def _session_id(session: int) -> str:
    return f"measurement {session}"
