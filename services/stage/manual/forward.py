"""Computes POST /forward in the worker's thread, between two steps of served requests.

At most one piece of one forward stands in the worker's inbox, so a served step waits for no more than a piece.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed, NotReady, RequestTimedOut, Unprocessable
from noodle.metrics.counted import StageMetrics
from noodle.web.service import place_in
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, SliceOutput, Span
from services.stage.executors.hidden_states import decode
from services.stage.manual.format import MAXIMUM_FORWARD_TOKENS, ForwardRequest, ForwardResult
from services.stage.worker.worker import Role, Worker

MAXIMUM_WAITING_FORWARDS = 4  # each with a body of a few megabytes; more get 429
FORWARD_TURN_SECONDS = 30.0  # for the forwards before it
FORWARD_COMPUTE_SECONDS = 120.0  # for the steps in progress, and its own computing
PIECE_SECONDS = 0.1  # how long a served step may wait for a forward; a longer one is computed in pieces
SMALLEST_PIECE_TOKENS = 16  # takes little longer than one token: the weights are read once for all of them


class Forwards:
    """Hands forwards from the routes' threads to the worker's."""

    def __init__(self, stage_id: int, worker: Worker, metrics: StageMetrics) -> None:
        self._stage_id, self._worker, self._metrics = stage_id, worker, metrics
        self._places = threading.BoundedSemaphore(MAXIMUM_WAITING_FORWARDS)
        self._turn = threading.Lock()
        self._piece_tokens = SMALLEST_PIECE_TOKENS

    def place(self) -> AbstractContextManager[None]:
        """Hold a place from before a body is read until its answer is made; raises TooManyRequests without one."""
        return place_in(self._places, f"{MAXIMUM_WAITING_FORWARDS} forwards are in progress on stage {self._stage_id}.")

    def compute(self, role: Role, request: ForwardRequest) -> ForwardResult:
        """Wait for the turn, then for the worker; raises RequestTimedOut, and what the computation raises.

        Tokens computed before a timeout stay computed; the same forward may be sent again.
        """
        if not self._turn.acquire(timeout=FORWARD_TURN_SECONDS):
            self._raise_timed_out("the forwards before it", FORWARD_TURN_SECONDS)
        try:
            progress = _Progress(time.monotonic() + FORWARD_COMPUTE_SECONDS)
            while (result := self._in_worker(role, request, progress)) is None:
                pass
            return result
        finally:
            self._turn.release()

    def _in_worker(self, role: Role, request: ForwardRequest, progress: _Progress) -> ForwardResult | None:
        done: Future[ForwardResult | None] = Future()

        def run(current: Role | None) -> None:
            if not done.set_running_or_notify_cancel():
                return  # the request has timed out
            try:
                done.set_result(self._compute_piece(current, role, request, progress))
            except Exception as error:  # noqa: BLE001  # raised in the request's thread, not in the worker's
                done.set_exception(error)

        self._worker.between_steps(run)
        try:
            return done.result(max(0.0, progress.deadline - time.monotonic()))
        except TimeoutError:
            done.cancel()
            self._raise_timed_out("the stage's worker", FORWARD_COMPUTE_SECONDS)

    def _compute_piece(
        self, current: Role | None, role: Role, request: ForwardRequest, progress: _Progress
    ) -> ForwardResult | None:
        """In the worker's thread: compute the next tokens; returns the result after the last of them."""
        if current is not role:
            raise NotReady(f"Stage {self._stage_id} has just changed its layers.", retry_after_seconds=1)
        sessions, model_slice, tensor = role.forwards, role.model_slice, request.tensor
        if tensor is None:
            model_slice.release(sessions.end(request.session_id))
            return ForwardResult(0)
        tokens = tensor.shape[0]
        if progress.span is None:
            progress.span, displaced = sessions.admit(request.session_id, request.token_index, tokens, time.monotonic())
            for name in displaced:
                model_slice.release(name)
        done_tokens = progress.done_tokens
        piece_tokens = min(self._piece_tokens, tokens - done_tokens)
        is_last_piece = done_tokens + piece_tokens == tokens
        first_position = progress.span.first_position + done_tokens
        piece = replace(progress.span, first_position=first_position, token_count=piece_tokens)
        length = first_position + piece_tokens
        started = time.monotonic()
        try:
            batch = _batch(piece, tensor, done_tokens, with_logits=model_slice.is_last and is_last_piece)
            progress.add(model_slice.forward(batch), piece_tokens)
            result = progress.result(length) if is_last_piece else None
        except Exception:
            model_slice.release(sessions.end(request.session_id))
            raise
        if is_last_piece and request.end:
            model_slice.release(sessions.end(request.session_id))
        else:
            sessions.computed(request.session_id, length, time.monotonic())
        self._metrics.forward_tokens.inc(piece_tokens)
        self._fit_pieces(time.monotonic() - started, piece_tokens)
        return result

    def _fit_pieces(self, seconds: float, tokens: int) -> None:
        """Adapt the size of pieces so that they take about PIECE_SECONDS."""
        if seconds > PIECE_SECONDS:
            self._piece_tokens = max(SMALLEST_PIECE_TOKENS, self._piece_tokens // 2)
        elif seconds < PIECE_SECONDS / 4 and tokens == self._piece_tokens:
            self._piece_tokens = min(2 * self._piece_tokens, MAXIMUM_FORWARD_TOKENS)

    def _raise_timed_out(self, what: str, seconds: float) -> NoReturn:
        raise RequestTimedOut(
            f"The forward waited {seconds:.0f} s for {what} on stage {self._stage_id}.", cure="Try again later."
        )


@dataclass(slots=True)
class _Progress:
    """How far a forward has come."""

    deadline: float
    span: Span | None = None  # of the whole forward, once it is admitted
    done_tokens: int = 0
    hidden_states: list[ActivationTensor] = field(default_factory=list)
    logits: npt.NDArray[np.float32] | None = None  # [vocab_size] of the last token, on the last stage

    def add(self, output: SliceOutput, tokens: int) -> None:
        """Keep a piece's output; raises Unprocessable when the activations or the dtype made it overflow."""
        self.done_tokens += tokens
        if output.hidden_states is not None:
            is_finite = np.isfinite(decode(output.hidden_states)).all()
            kept = memoryview(bytes(output.hidden_states.data))  # the slice's next forward overwrites its output
            self.hidden_states.append(replace(output.hidden_states, data=kept))
        elif output.logits is not None and len(output.logits):
            is_finite = np.isfinite(output.logits[0]).all()
            self.logits = output.logits[0]
        else:
            return  # not the last piece on the last stage
        if not is_finite:
            raise Unprocessable(
                "Computing with these activations overflows: some of the results are infinite or not numbers.",
                cure="Send smaller numbers, or set NOODLE_DTYPE=float32 on the stage.",
                param="activations",
            )

    def result(self, length: int) -> ForwardResult:
        if not self.hidden_states:
            if self.logits is None:
                raise GenerationFailed("The last stage's slice returned no logits.")
            return ForwardResult(length, logits=self.logits)
        first = self.hidden_states[0]
        data = memoryview(b"".join(each.data for each in self.hidden_states))
        hidden_states = ActivationTensor(first.dtype, (self.done_tokens, first.shape[1]), data)
        return ForwardResult(length, hidden_states=hidden_states)


def _batch(piece: Span, tensor: ActivationTensor, begin: int, *, with_logits: bool) -> PackedBatch:
    """Pack the tensor's rows from `begin` on; logits are asked for the last one."""
    rows = np.array([piece.token_count - 1] if with_logits else [], np.int64)
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    data = tensor.data[begin * row_bytes : (begin + piece.token_count) * row_bytes]
    if tensor.dtype == "int32":
        return PackedBatch((piece,), rows, token_ids=np.frombuffer(data, np.int32).astype(np.int64))
    shape = (piece.token_count, tensor.shape[1])
    return PackedBatch((piece,), rows, hidden_states=ActivationTensor(tensor.dtype, shape, data))
