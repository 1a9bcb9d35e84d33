"""How requests get into the loop and out of it: checked, recorded, counted as open. HTTP threads call this."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from noodle.cluster.plan import Plan
from noodle.errors import GenerationFailed, NoodleError, NotReady, TooManyRequests, Unprocessable
from services.coordinator.engine.pipeline import PipelineEvent
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.request import Client, Request, RequestStream, Token
from services.coordinator.engine.sequence import PlanLimits, Sequence

LONGEST_KEPT_ID = 48  # characters of a client's id; a session's id has 64 at most


@dataclass(frozen=True, slots=True)
class Ended:
    """A request was cancelled by its client, or its text is complete."""

    request_id: str
    outcome: str
    error: NoodleError | None = None


@dataclass(frozen=True, slots=True)
class Activate:
    """Compute by this plan as soon as the steps in flight are back; if it is active, by its new limits at once."""

    plan: Plan
    limits: PlanLimits
    coordinator_epoch: int


@dataclass(frozen=True, slots=True)
class StandBy:
    """End every open request with this error and compute nothing: another coordinator leads."""

    error: NoodleError


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop; open requests end with an error."""


LoopEvent = PipelineEvent | Sequence | Ended | Activate | StandBy | Stop  # a sequence is a request that came in


@dataclass(slots=True)
class LoopState:
    """The state of the loop, for /health."""

    plan: Plan | None = None
    up: bool = False
    detail: str = "no plan is active"
    boot_ids: tuple[str, ...] = field(default=())


class OpenRequests:
    """All open requests by id, waiting and running. Any thread may read it."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._open: dict[str, RequestStream] = {}
        self._changed = threading.Condition()

    def add(self, stream: RequestStream, client: Client) -> None:
        """Add a new request. Raises TooManyRequests at the limit of all requests, or at the client's."""
        with self._changed:
            if len(self._open) >= self._maximum:
                raise TooManyRequests(
                    f"{len(self._open)} requests are open, which is the limit.", retry_after_seconds=2
                )
            of_client = sum(each.request.client_name == client.name for each in self._open.values())
            if client.maximum_open and of_client >= client.maximum_open:
                raise TooManyRequests(
                    f"{of_client} requests of this key are in progress, which is its limit.",
                    cure="Wait for one of them, or raise NOODLE_MAX_REQUESTS_PER_KEY.",
                    retry_after_seconds=1,
                )
            self._open[stream.request_id] = stream

    def restore(self, stream: RequestStream) -> bool:
        """Add a request that was open before, without regard to the limits. Returns False if it is open already."""
        with self._changed:
            return self._open.setdefault(stream.request_id, stream) is stream

    def get(self, request_id: str) -> RequestStream | None:
        return self._open.get(request_id)

    def pop(self, request_id: str) -> RequestStream | None:
        with self._changed:
            found = self._open.pop(request_id, None)
            self._changed.notify_all()
            return found

    def all(self) -> list[RequestStream]:
        with self._changed:
            return list(self._open.values())

    def wait_until_none(self, seconds: float) -> None:
        """Return when all requests have ended or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, seconds)


class Admission:
    """Admits requests to the loop. `limits` and `state` return the loop's current ones."""

    def __init__(
        self,
        open_requests: OpenRequests,
        recorder: Recorder,
        notify: Callable[[LoopEvent], None],
        *,
        limits: Callable[[], PlanLimits | None],
        state: Callable[[], LoopState],
    ) -> None:
        self._open, self._recorder, self._notify = open_requests, recorder, notify
        self._limits, self._state = limits, state
        self.is_draining = False  # new requests are refused

    def submit(self, request: Request, client: Client, end_token_ids: frozenset[int]) -> RequestStream:
        """Record a request and hand it to the loop.

        Raises NotReady, TooManyRequests, QueueUnavailable, and Unprocessable if it can never fit.
        """
        limits = self._limits()
        if self.is_draining:
            raise NotReady("The coordinator is stopping.", retry_after_seconds=5)
        if limits is None or not self._state().up:
            raise NotReady(f"The cluster is not ready: {self._state().detail}.", retry_after_seconds=2)
        needed = len(request.prompt_token_ids) + request.max_new_tokens
        room = min(limits.kv_tokens, limits.reserved_kv_tokens or limits.kv_tokens)
        if needed > room:
            raise Unprocessable(
                f"The request needs KV rows for {needed} tokens; the tightest stage has room for {room}.",
                cure="Ask for fewer tokens, or give the stages more memory (NOODLE_KV_BYTES).",
            )
        name, now = request.client_request_id, time.time()
        request = replace(
            request,
            request_id=f"{name[:LONGEST_KEPT_ID]}-{secrets.token_hex(6)}" if name else uuid.uuid4().hex,
            created_unix_seconds=int(now),
            deadline_unix_seconds=now + request.timeout_seconds if request.timeout_seconds else 0.0,
        )
        stream = RequestStream(request, self.end_early)
        self._open.add(stream, client)
        try:
            self._recorder.begin(request)
        except NoodleError:
            self._open.pop(request.request_id)
            raise
        self._notify(Sequence(request, end_token_ids))
        return stream

    def resume(
        self, request: Request, tokens: list[Token], end_token_ids: frozenset[int], return_seconds: float
    ) -> RequestStream | None:
        """Continue a request that an earlier coordinator had in progress. Returns None if it is open here already.

        Its client has at least `return_seconds` to come back.
        """
        if request.score_prompt:  # the scores were not recorded, and readers get them before the first token
            tokens = []
        resume_seconds = max(request.resume_seconds, return_seconds)
        stream = RequestStream(replace(request, resume_seconds=resume_seconds), self.end_early, was_resumed=True)
        stream.unread_since = stream.arrived_at
        if not self._open.restore(stream):
            return None
        for token in tokens:
            stream.put(token)
        self._recorder.resume(request, list(tokens))
        if tokens:
            stream.last_token_at = stream.arrived_at
        if len(tokens) >= request.max_new_tokens or (tokens and tokens[-1].finish_reason):
            self.end_early(request.request_id, "finished")  # only its end was not recorded
        else:
            sequence = Sequence(request, end_token_ids)
            sequence.token_ids += [token.token_id for token in tokens]
            self._notify(sequence)
        return stream

    def end_early(self, request_id: str, outcome: str) -> None:
        """End a request on every stage: "cancelled" by its client, or "finished" because its text is complete."""
        error = None if outcome == "finished" else GenerationFailed("The request was cancelled.", cure="Send it again.")
        self._notify(Ended(request_id, outcome, error))
