"""The interface of a model slice (design D13), and what both executors share to read weights and to time runs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from noodle.errors import WireError
from noodle.wire.frames import ActivationTensor

ReadProgress = Callable[[int, int], None]  # bytes done, bytes in all
Fetch = Callable[[Collection[str]], None]  # brings tensors, by their keys, that the folder lacks


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one session in a packed batch; spans follow one another on the packed axis."""

    session_id: str
    first_position: int  # position of the span's first token in its session
    token_count: int
    reserve_tokens: int  # KV rows that the session needs at most; a larger value than before moves its rows


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Tokens of several sessions for one forward pass: token ids on the first stage, hidden states on the others.

    Hidden states on the first stage are input embeddings, as transformers' `inputs_embeds`: a family's positions and
    scaling before the first layer still apply to them.
    """

    spans: tuple[Span, ...]
    # [rows] rows of the packed axis whose logits are computed; empty off the last stage
    logits_rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64] | None = None  # [total_tokens]
    hidden_states: ActivationTensor | None = None  # [total_tokens, hidden_size]


@dataclass(frozen=True, slots=True)
class SliceOutput:
    """`hidden_states` [total_tokens, hidden_size] off the last stage, `logits` [rows, vocab_size] float32 on it.

    The hidden states may lie in the slice's own memory: they are valid until its next `forward` or `close`, and copied
    by callers that keep them longer. Sending a step returns only when its bytes have left or were copied.
    """

    hidden_states: ActivationTensor | None = None
    logits: npt.NDArray[np.float32] | None = None


class ModelSlice(Protocol):
    """Layers [start_layer, end_layer) of one model with the KV rows of its sessions."""

    start_layer: int
    end_layer: int
    is_first: bool
    is_last: bool
    hidden_size: int
    vocab_size: int
    dtype: str  # of the hidden states that it sends: float32, float16 or bfloat16
    weight_bytes: int  # of its tensors, as held in memory
    weights_note: str  # how a quantized checkpoint was read; empty for weights as stored
    kv_bytes_per_token: int  # of one session, over all layers of the slice
    reserves_upfront: bool  # whether a session occupies all the memory that it reserves from its start

    def reserve(self, session_id: str, reserve_tokens: int, end: int) -> object:
        """Hold memory for a session's KV rows up to `end` until `release`. Idempotent.

        Raises StepRefused with reason `kv_budget` if the budget is exhausted; nothing is held then.
        """

    def copy_rows(self, from_session_id: str, to_session_id: str, tokens: int, reserve_tokens: int) -> None:
        """Copy the first rows of one session to another, which then need not be computed.

        Raises PositionGap if the source has fewer rows, StepRefused as `reserve`; nothing is held then.
        """

    def forward(self, batch: PackedBatch) -> SliceOutput:
        """Compute one packed batch and keep its K and V rows.

        Rows before a span's first position must be computed already; computing a row again overwrites it. Raises
        GenerationFailed if the device runs out of memory.
        """

    def logits_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits [rows, vocab_size] of rows of the last `forward`'s packed axis; last stage only.

        The caller bounds the number of rows: each is as long as the vocabulary.
        """

    def release(self, session_id: str) -> None:
        """Free the KV rows of a session, if it holds any."""

    def kv_bytes_held(self) -> int:
        """Bytes that the KV rows of all sessions count for."""

    def set_kv_budget(self, budget_bytes: int | None) -> None:
        """Limit the bytes that sessions may hold from now on; None removes the limit."""

    def fill_rows_with_noise(self, session_id: str, tokens: int) -> None:
        """Give a session that holds rows `tokens` of them without computing, to time steps far into a context."""

    def set_threads(self, threads: int) -> None:
        """Compute the next steps with this many threads of the CPU; cards ignore it."""

    def synchronize(self) -> None:
        """Wait until the device has computed all steps so far."""


def checked_hidden_states(model_slice: ModelSlice, batch: PackedBatch) -> ActivationTensor:
    """The hidden states of a batch; raises WireError if they are missing or are not one row per token."""
    if batch.hidden_states is None:
        wants = "token ids or input embeddings" if model_slice.is_first else "hidden states"
        raise WireError(f"layers from {model_slice.start_layer} on need {wants}, and received none.")
    total_tokens = sum(span.token_count for span in batch.spans)
    if batch.hidden_states.shape != (total_tokens, model_slice.hidden_size):
        raise WireError(
            f"hidden states of shape {list(batch.hidden_states.shape)} came for {total_tokens} tokens of "
            f"hidden size {model_slice.hidden_size}."
        )
    return batch.hidden_states


def ignore_progress(_done_bytes: int, _total_bytes: int) -> None:
    """Show no progress."""


def nothing_to_fetch(_keys: Collection[str]) -> None:
    """Fetch nothing: the folder holds all tensors."""


@dataclass
class ReadCounter:
    """Counts bytes of tensors read from disk and reports the sum to `progress`; several threads may add."""

    progress: ReadProgress = ignore_progress
    bytes_read: int = 0
    total_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read_bytes: int) -> None:
        with self._lock:
            self.bytes_read += read_bytes
            self.progress(self.bytes_read, self.total_bytes)


def least_seconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each run's fastest round, taken in turn: other load on a machine only adds time."""
    least = [math.inf] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[index] = min(least[index], time.perf_counter() - start)
    return least
