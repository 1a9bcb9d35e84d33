"""The computing side of POST /forward: in the worker's thread, between two steps of served requests.

At most one piece of one forward stands in the worker's inbox, so a served step waits for no more than a piece.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed, NotReady, RequestTimedOut, TooManyRequests, Unprocessable
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import ActivationTensor
from noodle.wire.messages import SamplingParameters
from services.stage.executors.base import PackedBatch, SliceOutput, Span
from services.stage.manual.forward_format import MAXIMUM_FORWARD_TOKENS, ForwardRequest, ForwardResult, all_finite
from services.stage.worker.sampler import sample
from services.stage.worker.worker import Role, Worker

MAXIMUM_WAITING_FORWARDS = 4  # taken in at the same time, each with a body of a few megabytes; more get 429
FORWARD_TURN_SECONDS = 30.0  # for those before it
FORWARD_COMPUTE_SECONDS = 120.0  # for the steps in progress, and its own computing
PIECE_SECONDS = 0.1  # what a served step may wait for a forward: longer ones are computed in pieces
SMALLEST_PIECE_TOKENS = 16  # takes little longer than one token: the weights are read once for all of them
GREEDY = SamplingParameters()


class Forwards:
    """Takes forwards from the routes' threads to the worker's."""

    def __init__(self, stage_id: int, worker: Worker, metrics: StageMetrics) -> None:
        self._stage_id, self._worker, self._metrics = stage_id, worker, metrics
        self._places = threading.BoundedSemaphore(MAXIMUM_WAITING_FORWARDS)
        self._turn = threading.Lock()
        self._piece_tokens = SMALLEST_PIECE_TOKENS

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Held from before a body is read until its answer is made; raises TooManyRequests when all are taken."""
        if not self._places.acquire(blocking=False):
            raise TooManyRequests(
                f"{MAXIMUM_WAITING_FORWARDS} forwards are in progress on stage {self._stage_id}.",
                cure="Send the next one when one of them is answered.",
                retry_after_seconds=1,
            )
        try:
            yield
        finally:
            self._places.release()

    def compute(self, role: Role, request: ForwardRequest) -> ForwardResult:
        """Wait for the turn, then for the worker; raises RequestTimedOut, and what the computing raises.

        What was computed before a time ran out stays; the same forward may be sent again.
        """
        if not self._turn.acquire(timeout=FORWARD_TURN_SECONDS):
            self._raise_timed_out("the forwards before it", FORWARD_TURN_SECONDS)
        try:
            course = _Course(time.monotonic() + FORWARD_COMPUTE_SECONDS)
            while (result := self._in_worker(role, request, course)) is None:
                pass
            return result
        finally:
            self._turn.release()

    def _in_worker(self, role: Role, request: ForwardRequest, course: _Course) -> ForwardResult | None:
        done: Future[ForwardResult | None] = Future()

        def run(current: Role | None) -> None:
            if not done.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                done.set_result(self._compute_piece(current, role, request, course))
            except Exception as error:  # noqa: BLE001  # it goes to the request that waits, and not on to the worker
                done.set_exception(error)

        self._worker.between_steps(run)
        try:
            return done.result(max(0.0, course.deadline - time.monotonic()))
        except TimeoutError:
            done.cancel()
            self._raise_timed_out("the stage's worker", FORWARD_COMPUTE_SECONDS)

    def _compute_piece(
        self, current: Role | None, role: Role, request: ForwardRequest, course: _Course
    ) -> ForwardResult | None:
        """In the worker's thread: the next tokens of the forward; its result after the last of them."""
        if current is not role:
            raise NotReady(f"Stage {self._stage_id} has just changed its layers.", retry_after_seconds=1)
        sessions, model_slice = role.forwards, role.model_slice
        if request.tensor is None:
            model_slice.release(sessions.end(request.session_id))
            return ForwardResult(0)
        tokens = request.tensor.shape[0]
        if course.span is None:
            admitted = sessions.admit(request.session_id, request.token_index, tokens, time.monotonic())
            for name in admitted.displaced:
                model_slice.release(name)
            course.span = admitted.span
        piece = _piece_of(course, min(self._piece_tokens, tokens - course.done_tokens))
        is_last_piece = course.done_tokens + piece.token_count == tokens
        length = piece.first_position + piece.token_count
        started = time.monotonic()
        failed = True
        try:
            batch = _batch(piece, request, course.done_tokens, with_logits=model_slice.is_last and is_last_piece)
            course.take(model_slice.forward(batch), piece.token_count)
            result = _result(course, length, request.logits) if is_last_piece else None
            failed = False
        finally:
            if failed or (is_last_piece and request.end):
                model_slice.release(sessions.end(request.session_id))
        if not (is_last_piece and request.end):
            sessions.computed(request.session_id, length, time.monotonic())
        self._metrics.forward_tokens.inc(piece.token_count)
        self._fit_pieces(time.monotonic() - started, piece.token_count)
        return result

    def _fit_pieces(self, seconds: float, tokens: int) -> None:
        """Let pieces take about PIECE_SECONDS on this machine, whatever the model."""
        if seconds > PIECE_SECONDS:
            self._piece_tokens = max(SMALLEST_PIECE_TOKENS, self._piece_tokens // 2)
        elif seconds < PIECE_SECONDS / 4 and tokens == self._piece_tokens:
            self._piece_tokens = min(2 * self._piece_tokens, MAXIMUM_FORWARD_TOKENS)

    def _raise_timed_out(self, what: str, seconds: float) -> NoReturn:
        raise RequestTimedOut(
            f"The forward waited {seconds:.0f} s for {what} on stage {self._stage_id}.", cure="Try again later."
        )


@dataclass(slots=True)
class _Course:
    """How far a forward has come."""

    deadline: float
    span: Span | None = None  # of the whole forward, once it is admitted
    done_tokens: int = 0
    hidden_states: list[ActivationTensor] = field(default_factory=list)
    logits: npt.NDArray[np.float32] | None = None  # [vocab_size] of the last token, on the last stage

    def take(self, output: SliceOutput, tokens: int) -> None:
        """Keep what a piece gave; numbers that overflowed are the activations' fault or the dtype's, and no answer."""
        self.done_tokens += tokens
        if output.hidden_states is not None:
            finite = all_finite(output.hidden_states)
            self.hidden_states.append(output.hidden_states)
        elif output.logits is not None and len(output.logits):
            finite = bool(np.isfinite(output.logits[0]).all())
            self.logits = output.logits[0]
        else:
            return  # a piece of the last stage that no token follows
        if not finite:
            raise Unprocessable(
                "Computing with these activations overflows: some of the results are infinite or not numbers.",
                cure="Send smaller numbers, or set NOODLE_DTYPE=float32 on the stage.",
                param="activations",
            )


def _piece_of(course: _Course, tokens: int) -> Span:
    assert course.span is not None  # noqa: S101  # admitted before its first piece
    return replace(course.span, first_position=course.span.first_position + course.done_tokens, token_count=tokens)


def _batch(piece: Span, request: ForwardRequest, begin: int, *, with_logits: bool) -> PackedBatch:
    """Rows from `begin` on as the slice takes them; logits are asked for the last one."""
    tensor = request.tensor
    assert tensor is not None  # noqa: S101  # a request without one was answered before
    rows = np.array([piece.token_count - 1] if with_logits else [], np.int64)
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    data = tensor.data[begin * row_bytes : (begin + piece.token_count) * row_bytes]
    if tensor.dtype == "int32":
        return PackedBatch((piece,), rows, token_ids=np.frombuffer(data, np.int32).astype(np.int64))
    shape = (piece.token_count, tensor.shape[1])
    return PackedBatch((piece,), rows, hidden_states=ActivationTensor(tensor.dtype, shape, data))


def _result(course: _Course, length: int, with_logits: bool) -> ForwardResult:
    """What goes back after the last piece."""
    if course.hidden_states:
        first = course.hidden_states[0]
        if len(course.hidden_states) == 1:
            return ForwardResult(length, hidden_states=first)
        data = memoryview(b"".join(each.data for each in course.hidden_states))
        return ForwardResult(
            length, hidden_states=ActivationTensor(first.dtype, (course.done_tokens, first.shape[1]), data)
        )
    if course.logits is None:
        raise GenerationFailed("The last stage's slice gave no logits.")
    token_id, _ = sample(course.logits, GREEDY, length, with_logprob=False)
    return ForwardResult(length, token_id=token_id, logits=course.logits if with_logits else None)
