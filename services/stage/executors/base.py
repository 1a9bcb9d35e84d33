"""What the worker asks of a slice of a model (design D13); knows neither the executor that computes it nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from noodle.errors import WireError
from noodle.wire.frames import ActivationTensor


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one session in a packed batch; they stand in rows of the packed axis in the order of the spans."""

    session_id: str
    first_position: int  # position of the span's first token in its session
    token_count: int
    reserve_tokens: int  # KV rows this session needs at most; more than before moves its rows to larger ones


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Tokens of several sessions for one forward pass: token ids on the first stage, hidden states on the others.

    Hidden states on the first stage are input embeddings, taken where transformers takes its `inputs_embeds`: what a
    family does to its embeddings before the first layer (positions, scaling) is still done to them.
    """

    spans: tuple[Span, ...]
    # [rows] rows of the packed axis whose logits are asked for; empty off the last stage
    logits_rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64] | None = None  # [total_tokens]
    hidden_states: ActivationTensor | None = None  # [total_tokens, hidden_size]


@dataclass(frozen=True, slots=True)
class SliceOutput:
    """`hidden_states` [total_tokens, hidden_size] off the last stage, `logits` [rows, vocab_size] float32 on it."""

    hidden_states: ActivationTensor | None = None
    logits: npt.NDArray[np.float32] | None = None


class ModelSlice(Protocol):
    """Layers [start_layer, end_layer) of one model with the KV rows of their sessions."""

    start_layer: int
    end_layer: int
    is_first: bool
    is_last: bool
    hidden_size: int
    vocab_size: int
    dtype: str  # of the hidden states it hands on: float32, float16 or bfloat16
    weight_bytes: int  # bytes of the tensors it computes with, as held in memory
    kv_bytes_per_token: int  # of one session, over all its layers
    counts_reservations: bool  # whether a session takes all the room that it reserves from its start

    def reserve(self, session_id: str, reserve_tokens: int, end: int) -> None:
        """Hold room for the KV rows of a session up to `end`, until `release`; one that has it already is fine.

        Raises StepRefused with reason `kv_budget` when there is none; nothing is held then.
        """
        ...

    def copy_rows(self, from_session_id: str, to_session_id: str, tokens: int, reserve_tokens: int) -> None:
        """Let a session have the first rows of another one as its own, in place of computing them.

        Raises PositionGap when the other has fewer, StepRefused as `reserve`; nothing is held then.
        """
        ...

    def forward(self, batch: PackedBatch) -> SliceOutput:
        """Compute one packed batch and keep its K and V rows.

        Rows before a span's first position must have been computed before; rows that were computed before are
        computed again into the same place. Raises GenerationFailed when the device runs out of memory.
        """
        ...

    def logits_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits [rows, vocab_size] of rows of the packed axis that the last `forward` computed; last stage only.

        The caller bounds their number: a row is as long as the vocabulary.
        """
        ...

    def release(self, session_id: str) -> None:
        """Free the KV rows of a session; one that it does not hold is fine."""
        ...

    def kv_bytes_held(self) -> int:
        """Bytes that KV rows of all sessions count for now."""
        ...

    def set_kv_budget(self, budget_bytes: int | None) -> None:
        """The most bytes that sessions may hold from now on; None is no bound."""
        ...


def checked_hidden_states(model_slice: ModelSlice, batch: PackedBatch) -> ActivationTensor:
    """The hidden states that a slice is to compute with; raises WireError when none came, or not a row per token."""
    if batch.hidden_states is None:
        wants = "token ids or input embeddings" if model_slice.is_first else "hidden states"
        raise WireError(f"layers from {model_slice.start_layer} on compute with {wants}, and none came.")
    total_tokens = sum(span.token_count for span in batch.spans)
    if batch.hidden_states.shape != (total_tokens, model_slice.hidden_size):
        raise WireError(
            f"hidden states of shape {list(batch.hidden_states.shape)} came for {total_tokens} tokens of "
            f"hidden size {model_slice.hidden_size}."
        )
    return batch.hidden_states
