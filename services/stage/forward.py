"""The computing side of POST /forward: one span, in the worker's thread, between two steps of served requests.

At most one forward stands in the worker's inbox, so a served step waits for no more than one of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NoReturn

import numpy as np

from noodle.errors import GenerationFailed, NotReady, RequestTimedOut, TooManyRequests, Unprocessable
from noodle.messages import SamplingParameters
from services.stage.forward_format import ForwardRequest, ForwardResult, all_finite
from services.stage.sampler import sample
from services.stage.slice_interface import PackedBatch, SliceOutput, Span
from services.stage.worker import Role, Worker

MAXIMUM_WAITING_FORWARDS = 4  # taken in at the same time, each with a body of a few megabytes; more get 429
FORWARD_TURN_SECONDS = 30.0  # for those before it
FORWARD_COMPUTE_SECONDS = 60.0  # for the step in progress, and its own computing
GREEDY = SamplingParameters()


class Forwards:
    """Takes forwards from the routes' threads to the worker's."""

    def __init__(self, stage_id: int, worker: Worker) -> None:
        self._stage_id, self._worker = stage_id, worker
        self._places = threading.BoundedSemaphore(MAXIMUM_WAITING_FORWARDS)
        self._turn = threading.Lock()

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
        """Wait for the turn, then for the worker; raises RequestTimedOut, and what the computing raises."""
        if not self._turn.acquire(timeout=FORWARD_TURN_SECONDS):
            self._raise_timed_out("the forwards before it", FORWARD_TURN_SECONDS)
        try:
            done: Future[ForwardResult] = Future()

            def run(current: Role | None) -> None:
                if not done.set_running_or_notify_cancel():
                    return  # nobody waits any more
                try:
                    done.set_result(self._compute_now(current, role, request))
                except Exception as error:  # noqa: BLE001  # it goes to the request that waits, and not on to the worker
                    done.set_exception(error)

            self._worker.between_steps(run)
            try:
                return done.result(FORWARD_COMPUTE_SECONDS)
            except TimeoutError:
                done.cancel()
                self._raise_timed_out("the stage's worker", FORWARD_COMPUTE_SECONDS)
        finally:
            self._turn.release()

    def _compute_now(self, current: Role | None, role: Role, request: ForwardRequest) -> ForwardResult:
        """In the worker's thread."""
        if current is not role:
            raise NotReady(f"Stage {self._stage_id} has just changed its layers.", retry_after_seconds=1)
        sessions, model_slice = role.forwards, role.model_slice
        if request.tensor is None:
            model_slice.release(sessions.end(request.session_id))
            return ForwardResult(0)
        tokens = request.tensor.shape[0]
        admitted = sessions.admit(request.session_id, request.token_index, tokens, time.monotonic())
        for name in admitted.displaced:
            model_slice.release(name)
        length = admitted.span.first_position + tokens
        failed = True
        try:
            output = model_slice.forward(_batch(admitted.span, request, model_slice.is_last))
            result = _result(output, length, request.logits)
            failed = False
        finally:
            if failed or request.end:
                model_slice.release(sessions.end(request.session_id))
        if not request.end:
            sessions.computed(request.session_id, length, time.monotonic())
        return result

    def _raise_timed_out(self, what: str, seconds: float) -> NoReturn:
        raise RequestTimedOut(
            f"The forward waited {seconds:.0f} s for {what} on stage {self._stage_id}.", cure="Try again later."
        )


def _batch(span: Span, request: ForwardRequest, is_last: bool) -> PackedBatch:
    """The one span as the slice takes it; on the last stage the logits of its last row are asked for."""
    assert request.tensor is not None  # noqa: S101  # a request without one was answered before
    rows = np.array([span.token_count - 1] if is_last else [], np.int64)
    if request.tensor.dtype == "int32":
        token_ids = np.frombuffer(request.tensor.data, np.int32).astype(np.int64)
        return PackedBatch((span,), rows, token_ids=token_ids)
    return PackedBatch((span,), rows, hidden_states=request.tensor)


def _result(output: SliceOutput, length: int, with_logits: bool) -> ForwardResult:
    """What goes back; numbers that overflowed are the activations' fault or the dtype's, and no answer."""
    if output.hidden_states is not None:
        if not all_finite(output.hidden_states):
            raise Unprocessable(
                "Computing with these activations overflows: some of the results are infinite or not numbers.",
                cure="Send smaller numbers, or set NOODLE_DTYPE=float32 on the stage.",
                param="activations",
            )
        return ForwardResult(length, hidden_states=output.hidden_states)
    if output.logits is None or not len(output.logits):
        raise GenerationFailed("The last stage's slice gave no logits.")
    if not np.isfinite(output.logits[0]).all():
        raise Unprocessable(
            "Computing with these activations overflows: the logits are not finite numbers.",
            cure="Send smaller numbers, or set NOODLE_DTYPE=float32 on the stage.",
            param="activations",
        )
    token_id, _ = sample(output.logits[0], GREEDY, length, with_logprob=False)
    return ForwardResult(length, token_id=token_id, logits=output.logits[0] if with_logits else None)
