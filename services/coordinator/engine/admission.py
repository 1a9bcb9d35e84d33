"""How a request gets into the loop of generate.py and out of it: checked, recorded, open; called by HTTP threads."""

from __future__ import annotations

import time
from collections.abc import Callable

from noodle.cluster.valkey import RecordedToken, RequestRecord
from noodle.errors import GenerationFailed, NoodleError, NotReady, Unprocessable
from services.coordinator.engine.loop_events import Ended, LoopEvent, LoopState, Submitted
from services.coordinator.engine.open_requests import OpenRequest, OpenRequests
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.request import (
    Generation,
    GenerationRequest,
    record_of,
    session_id_of,
    session_of,
    token_of,
)
from services.coordinator.engine.sequence import PlanLimits


class Admission:
    """The door of the loop; `limits` and `state` are the loop's as they are when they are asked for."""

    def __init__(
        self,
        open_requests: OpenRequests,
        recorder: Recorder,
        tell: Callable[[LoopEvent], None],
        limits: Callable[[], PlanLimits | None],
        state: Callable[[], LoopState],
    ) -> None:
        self._open, self._recorder, self._tell = open_requests, recorder, tell
        self._limits, self._state = limits, state
        self.is_draining = False  # new requests are refused

    def submit(self, request: GenerationRequest) -> tuple[RequestRecord, Generation]:
        """Take a request in and record it.

        Raises NotReady, TooManyRequests, QueueUnavailable, and Unprocessable if it can never fit.
        """
        limits = self._limits()
        if self.is_draining:
            raise NotReady("The coordinator is stopping.", retry_after_seconds=5)
        if limits is None or not self._state().up:
            raise NotReady(f"The cluster is not ready: {self._state().detail}.", retry_after_seconds=2)
        needed = len(request.prompt_token_ids) + request.maximum_new_tokens
        room = min(limits.kv_tokens, limits.reserved_kv_tokens or limits.kv_tokens)
        if needed > room:
            raise Unprocessable(
                f"The request needs KV rows for {needed} tokens; the tightest stage has room for {room}.",
                cure="Ask for fewer tokens, or give the stages more memory (NOODLE_KV_BYTES).",
            )
        request_id = session_id_of(request.request_id)
        record = record_of(request_id, request)
        generation = Generation(request_id, self.leave, self._finish, request.resume_seconds)
        deadline = time.monotonic() + request.timeout_seconds if request.timeout_seconds else None
        self._open.add(OpenRequest(generation, request.client.name, deadline), request.client)
        try:
            self._recorder.begin(record)
        except NoodleError:
            self._open.pop(request_id)
            raise
        self._tell(Submitted(session_of(record, request.end_token_ids)))
        return record, generation

    def go_on(
        self, record: RequestRecord, tokens: list[RecordedToken], end_token_ids: frozenset[int], return_seconds: float
    ) -> Generation | None:
        """Take up a request that a coordinator before this one had in progress; None when it is open here.

        Its client has at least `return_seconds` to come back.
        """
        if record.score_prompt:  # the scores were not recorded, and come before the first token
            tokens = []
        resume_seconds = max(record.resume_seconds, return_seconds)
        generation = Generation(record.request_id, self.leave, self._finish, resume_seconds)
        generation.unread_since = time.monotonic()
        deadline = None
        if record.deadline_unix_seconds:
            deadline = time.monotonic() + max(0.0, record.deadline_unix_seconds - time.time())
        opened = OpenRequest(generation, record.client_name, deadline, tokens=len(tokens))
        if not self._open.take_back(opened):
            return None
        for token in tokens:
            generation.put(token_of(token))
        self._recorder.go_on(record, list(tokens))
        session = session_of(record, end_token_ids)
        session.token_ids += [token.token_id for token in tokens]
        if tokens:
            opened.last_token_at = opened.arrived_at
        if len(tokens) >= record.max_new_tokens or (tokens and tokens[-1].finish_reason):
            self._tell(Ended(record.request_id, "finished", None))  # all but its end was recorded
        else:
            self._tell(Submitted(session))
        return generation

    def leave(self, request_id: str) -> None:
        """Nobody wants it any more: end it on every stage."""
        cancelled = GenerationFailed("The request was cancelled.", cure="Send it again.")
        self._tell(Ended(request_id, "cancelled", cancelled))

    def _finish(self, request_id: str) -> None:
        """Its text is complete, though more tokens might follow."""
        self._tell(Ended(request_id, "finished", None))
