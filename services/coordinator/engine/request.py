"""A request in progress: what the loop is asked for, and what HTTP threads read of it, from its beginning or later."""

from __future__ import annotations

import queue
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from noodle.cluster.valkey import RecordedToken, RequestRecord
from noodle.errors import GenerationFailed, NoodleError
from noodle.wire.messages import SamplingParameters, TokenLogprob, TokenScore
from services.coordinator.engine.sequence import FinishReason, Session

LONGEST_KEPT_ID = 48  # characters of a client's id; a session's id has 64 at most


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `finish_reason` is set on the last. `top` are the likeliest tokens at its place."""

    token_id: int
    logprob: float | None
    finish_reason: FinishReason | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """Comes before the first token: the scores of the prompt's tokens from its second on, none unless asked for.

    `is_all` says that no token follows, for none was asked for.
    """

    scores: tuple[TokenScore, ...]
    is_all: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a request is counted for; `maximum_open` is how many it may have in progress, 0 without a limit."""

    name: str
    maximum_open: int = 0


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's own word for a request, and what it asked: the same word with the same body is the same request."""

    key: str = ""
    body_digest: str = ""


NOT_IDEMPOTENT = Idempotency()
LOOPBACK = Client("loopback")  # whoever asks on this machine, where no key is needed


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, under which word for the request."""

    client: Client = LOOPBACK
    request_id: str = ""
    idempotency: Idempotency = NOT_IDEMPOTENT


NOBODY = Asker()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the loop needs of a request; everything was checked before. `request_id` is the client's word for it."""

    prompt_token_ids: list[int]
    maximum_new_tokens: int
    sampling: SamplingParameters
    end_token_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    want_logprob: bool = False
    top_logprobs: int = 0
    score_prompt: bool = False
    client: Client = LOOPBACK
    request_id: str = ""
    priority: int = 0  # lower ones are served first
    cache_salt: str = ""  # only requests with the same one share what is computed of their beginnings
    goes_on: bool = True  # whether the answer continues the prompt's own text
    resume_seconds: float = 0.0  # how long it goes on without a reader
    timeout_seconds: float = 0.0  # from its arrival; 0 is none
    idempotency: Idempotency = NOT_IDEMPOTENT
    answer_id: str = ""  # in OpenAI's shapes


def session_id_of(request_id: str) -> str:
    """What stages and Valkey know a request by: its id, made unlike that of one that came twice."""
    return f"{request_id[:LONGEST_KEPT_ID]}-{secrets.token_hex(6)}" if request_id else uuid.uuid4().hex


Item = Token | PromptComputed


class Generation:
    """All that came of a request so far, for any number of readers; the loop writes, HTTP threads read.

    A request without a reader goes on for `resume_seconds`; with 0 it is cancelled as soon as the last one leaves.
    """

    def __init__(
        self, request_id: str, leave: Callable[[str], None], finish: Callable[[str], None], resume_seconds: float = 0.0
    ) -> None:
        self.request_id = request_id
        self.resume_seconds = resume_seconds
        self._tell_left, self._tell_finished = leave, finish
        self._lock = threading.Lock()
        self.token_count = 0  # so far
        self._items: list[Item] = []  # bounded by the tokens that the request may generate
        self._readers: list[queue.SimpleQueue[Item | NoodleError]] = []
        self._end: NoodleError | None = None  # once it has ended
        self.unread_since: float | None = None  # None while somebody reads, or is about to

    # for the loop

    def put(self, item: Item) -> None:
        """One token more, or the prompt's scores."""
        with self._lock:
            self._items.append(item)
            self.token_count += isinstance(item, Token)
            for reader in self._readers:
                reader.put(item)

    def end(self, error: NoodleError) -> None:
        """Nothing follows; who reads beyond what came, as nobody does after a last token, is told `error`."""
        with self._lock:
            self._end = self._end or error
            for reader in self._readers:
                reader.put(error)

    def is_left(self, now: float) -> bool:
        """Whether nobody has read it for longer than it may go on."""
        return self.unread_since is not None and now - self.unread_since > self.resume_seconds

    # for HTTP threads

    def open_reader(self) -> GenerationReader:
        """Read it from its beginning."""
        items: queue.SimpleQueue[Item | NoodleError] = queue.SimpleQueue()
        with self._lock:
            for item in self._items:
                items.put(item)
            if self._end is not None:
                items.put(self._end)
            self._readers.append(items)
            self.unread_since = None
        return GenerationReader(self, items)

    def close_reader(self, items: queue.SimpleQueue[Item | NoodleError], *, is_complete: bool) -> None:
        """A reader leaves; with `is_complete` it has all that the request is for, and so nobody needs more."""
        with self._lock:
            if items not in self._readers:
                return
            self._readers.remove(items)
            if not self._readers:
                self.unread_since = time.monotonic()
            is_left = not self._readers and self.resume_seconds == 0
        if is_complete:
            self._tell_finished(self.request_id)
        elif is_left:
            self._tell_left(self.request_id)

    @property
    def reader_count(self) -> int:
        """How many read it now."""
        return len(self._readers)

    @property
    def has_ended(self) -> bool:
        """Whether nothing follows."""
        return self._end is not None

    @property
    def failure(self) -> NoodleError | None:
        """What ended it early, None while it goes on and when it finished."""
        return None if self._end is None or self._end is FINISHED else self._end


class GenerationReader:
    """A request in progress, as one HTTP thread sees it."""

    def __init__(self, generation: Generation, items: queue.SimpleQueue[Item | NoodleError]) -> None:
        self._generation, self._items = generation, items
        self.request_id = generation.request_id

    def next(self, timeout_seconds: float) -> Item | None:
        """What comes next, None when nothing comes in time; raises what ended the request early."""
        try:
            item = self._items.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, NoodleError):
            raise item
        return item

    def finish(self) -> None:
        """This reader has all that the request is for (a stop string came): it ends on every stage."""
        self._generation.close_reader(self._items, is_complete=True)

    def cancel(self) -> None:
        """Read no more; the request ends on every stage unless others read it or it may be resumed."""
        self._generation.close_reader(self._items, is_complete=False)


FINISHED = GenerationFailed("The request has ended.")  # what is read after its last token


def record_of(request_id: str, request: GenerationRequest) -> RequestRecord:
    """What Valkey keeps of a request, so that it can be computed again from the start."""
    deadline = time.time() + request.timeout_seconds if request.timeout_seconds else 0.0
    return RequestRecord(
        request_id,
        request.prompt_token_ids,
        request.maximum_new_tokens,
        request.sampling.temperature,
        request.sampling.top_p,
        request.sampling.top_k,
        request.sampling.seed,
        list(request.stop),
        not request.end_token_ids,
        client_request_id=request.request_id,
        client_name=request.client.name,
        priority=request.priority,
        cache_salt=request.cache_salt,
        want_logprob=request.want_logprob,
        top_logprobs=request.top_logprobs,
        score_prompt=request.score_prompt,
        goes_on=request.goes_on,
        resume_seconds=request.resume_seconds,
        idempotency_key=request.idempotency.key,
        body_digest=request.idempotency.body_digest,
        answer_id=request.answer_id,
        created_unix_seconds=int(time.time()),
        deadline_unix_seconds=deadline,
    )


def token_of(recorded: RecordedToken) -> Token:
    """A token as readers get it."""
    reason: FinishReason | None = None
    if recorded.finish_reason:
        reason = "eos" if recorded.finish_reason == "eos" else "length"
    return Token(recorded.token_id, recorded.logprob, reason, tuple(recorded.top))


def ended_generation(record: RequestRecord, tokens: list[RecordedToken]) -> Generation:
    """A request that has ended, to be read."""
    generation = Generation(record.request_id, _nobody_computes, _nobody_computes, record.resume_seconds)
    for token in tokens:
        generation.put(token_of(token))
    generation.end(FINISHED if record.outcome == "finished" else GenerationFailed(record.outcome))
    return generation


def _nobody_computes(_request_id: str) -> None:
    """It has ended."""


def sampling_of(record: RequestRecord) -> SamplingParameters:
    """How the tokens of a recorded request are drawn."""
    return SamplingParameters(temperature=record.temperature, top_p=record.top_p, top_k=record.top_k, seed=record.seed)


def session_of(record: RequestRecord, end_token_ids: frozenset[int]) -> Session:
    """What the scheduler computes of a request; tokens that are known already are still to be appended."""
    prompt = record.prompt_token_ids
    return Session(
        record.request_id,
        list(prompt),
        len(prompt),
        record.max_new_tokens,
        sampling_of(record),
        frozenset() if record.ignore_eos else end_token_ids,
        record.want_logprob,
        record.top_logprobs,
        [None] * (len(prompt) - 1) if record.score_prompt else None,
        client_name=record.client_name,
        priority=record.priority,
        cache_salt=record.cache_salt,
    )
