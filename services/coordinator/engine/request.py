"""A request, from its parsed body to its record in Valkey, and the stream of tokens that its readers follow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec.structs import replace

from noodle.errors import ContextTooLong, GenerationFailed, InvalidRequest, NoodleError
from noodle.wire.messages import SamplingParameters, TokenLogprob, TokenScore

FinishReason = Literal["length", "eos_token", "stop_sequence"]  # of an answer; the loop knows no stop strings

WIRE_SEED_MASK = (1 << 63) - 1  # seeds are signed 64-bit numbers in bodies and 63 bits on the wire
TOKEN_BYTES = 200  # of a kept token with all its objects, about
PROMPT_TOKEN_BYTES = 36


@dataclass(frozen=True, slots=True)
class Client:
    """The owner of a request. `maximum_open` bounds its requests in progress, 0 means no limit."""

    name: str
    maximum_open: int = 0


LOOPBACK = Client("loopback")  # programs on this machine, where no key is needed


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request: what its client asked for, who asked, and what admission added.

    Valkey keeps it as JSON. Encoded names stay as they are, and new fields need a default: a coordinator reads records
    that an older version wrote.
    """

    # the parsed body
    max_new_tokens: int  # at most; `fit_into_context` lowers it if `length_name` is None
    length_name: str | None = None  # the field that asked for `max_new_tokens`; None if it is a default
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int = 0  # the client's own, or the one drawn for it
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    want_logprob: bool = False  # of each new token
    top_logprobs: int = 0  # likeliest tokens to report beside each token
    score_prompt: bool = False  # whether the prompt's tokens get log-probabilities too
    priority: int = 0  # lower ones are served first
    cache_salt: str = ""  # only requests with the same one share KV rows of equal prefixes
    resume_seconds: float = 0.0  # how long the request runs without a reader
    timeout_seconds: float = 0.0  # from its arrival; 0 is none
    stream: bool = False
    include_usage: bool = False
    # the prompt
    prompt_token_ids: list[int] = []
    continues_prompt: bool = msgspec.field(default=True, name="goes_on")  # False in a chat: the answer is a new text
    # who asked
    client_name: str = LOOPBACK.name
    client_request_id: str = ""  # the client's own id for it
    idempotency_key: str = ""
    body_digest: str = ""  # set with an idempotency key: the same key with another body is refused
    # added by admission
    request_id: str = ""  # unique; stages know the request's session by it
    answer_id: str = ""  # in OpenAI's formats
    created_unix_seconds: int = 0
    deadline_unix_seconds: float = 0.0  # 0 is none
    outcome: str = ""  # empty while the request is open, "finished", or why it ended early

    @property
    def sampling(self) -> SamplingParameters:
        return SamplingParameters(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed & WIRE_SEED_MASK
        )


class Token(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One generated token, as the loop delivers it, readers get it and Valkey keeps it."""

    token_id: int
    logprob: float | None = None
    finish_reason: Literal["", "eos", "length"] = ""  # set on the last token
    top: tuple[TokenLogprob, ...] = ()  # likeliest tokens at its place


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """Precedes the first token: the scores of the prompt's tokens from its second on, if the request wants them.

    `is_all` means that no token follows because none was asked for.
    """

    scores: tuple[TokenScore, ...]
    is_all: bool = False


Item = Token | PromptComputed

FINISHED = GenerationFailed("The request has ended.")  # what a reader gets after the last token


class RequestStream:
    """Everything that came of a request so far, for any number of readers; the loop writes, HTTP threads read.

    A request without a reader runs on for `resume_seconds`; with 0 it is cancelled when its last reader leaves.
    `end_early(request_id, outcome)` asks the loop to end the request.
    """

    def __init__(self, request: Request, end_early: Callable[[str, str], None], *, was_resumed: bool = False) -> None:
        self.request = request
        self.request_id = request.request_id
        self.was_resumed = was_resumed  # from the record of an earlier coordinator, which may lack the newest tokens
        self.arrived_at = time.monotonic()
        self.deadline: float | None = None  # monotonic, None is none
        if request.deadline_unix_seconds:
            self.deadline = self.arrived_at + max(0.0, request.deadline_unix_seconds - time.time())
        self.token_count = 0
        self.last_token_at: float | None = None
        self.unread_since: float | None = None  # None while somebody reads, or is about to
        self.ended_at: float | None = None
        self._end_early = end_early
        self._lock = threading.Lock()
        self._items: list[Item] = []  # bounded by the tokens that the request may generate
        self._readers: list[queue.SimpleQueue[Item | NoodleError]] = []
        self._end: NoodleError | None = None  # set once it has ended

    # for the loop

    def put(self, item: Item) -> None:
        with self._lock:
            self._items.append(item)
            self.token_count += isinstance(item, Token)
            for reader in self._readers:
                reader.put(item)

    def end(self, error: NoodleError) -> None:
        """Mark the stream as ended. Readers that reach the end get `error`."""
        with self._lock:
            self._end = self._end or error
            self.ended_at = self.ended_at or time.monotonic()
            for reader in self._readers:
                reader.put(error)

    def is_abandoned(self, now: float) -> bool:
        """Whether it has been without a reader for longer than it may be."""
        return self.unread_since is not None and now - self.unread_since > self.request.resume_seconds

    # for HTTP threads

    def open_reader(self) -> RequestReader:
        """Read it from its beginning."""
        items: queue.SimpleQueue[Item | NoodleError] = queue.SimpleQueue()
        with self._lock:
            for item in self._items:
                items.put(item)
            if self._end is not None:
                items.put(self._end)
            self._readers.append(items)
            self.unread_since = None
        return RequestReader(self, items)

    def close_reader(self, items: queue.SimpleQueue[Item | NoodleError], *, is_complete: bool) -> None:
        """Remove a reader. With `is_complete` it has the whole answer, and no more tokens are needed."""
        with self._lock:
            if items not in self._readers:
                return
            self._readers.remove(items)
            if not self._readers:
                self.unread_since = time.monotonic()
            is_abandoned = not self._readers and self.request.resume_seconds == 0
        if is_complete or is_abandoned:
            self._end_early(self.request_id, "finished" if is_complete else "cancelled")

    @property
    def reader_count(self) -> int:
        return len(self._readers)

    @property
    def failure(self) -> NoodleError | None:
        """What ended it early; None while it runs and when it finished."""
        return None if self._end is FINISHED else self._end

    @property
    def kept_bytes(self) -> int:
        return len(self.request.prompt_token_ids) * PROMPT_TOKEN_BYTES + self.token_count * TOKEN_BYTES


class RequestReader:
    """One HTTP thread's view of a request in progress."""

    def __init__(self, stream: RequestStream, items: queue.SimpleQueue[Item | NoodleError]) -> None:
        self._stream, self._items = stream, items
        self.request_id = stream.request_id

    def next(self, timeout_seconds: float) -> Item | None:
        """Return the next item, None if none comes in time. Raises the error that ended the request early."""
        try:
            item = self._items.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, NoodleError):
            raise item
        return item

    def finish(self) -> None:
        """Stop reading because the answer is complete (a stop string came); the request ends on every stage."""
        self._stream.close_reader(self._items, is_complete=True)

    def cancel(self) -> None:
        """Stop reading. The request ends on every stage unless others read it or it may be resumed."""
        self._stream.close_reader(self._items, is_complete=False)


def ended_stream(request: Request, tokens: list[Token]) -> RequestStream:
    """A recorded request that has ended, for readers that resume it."""
    stream = RequestStream(request, lambda _request_id, _outcome: None, was_resumed=True)
    for token in tokens:
        stream.put(token)
    stream.end(FINISHED if request.outcome == "finished" else GenerationFailed(request.outcome))
    return stream


def fit_into_context(request: Request, *, context_length: int, prompt_name: str) -> Request:
    """Return the request with a `max_new_tokens` that fits after the prompt, which its body calls `prompt_name`.

    Raises ContextTooLong with the three numbers, and InvalidRequest for a prompt without tokens.
    """
    prompt_tokens = len(request.prompt_token_ids)
    if prompt_tokens < 1:
        raise InvalidRequest(f"'{prompt_name}' is empty.", cure="Give at least one token.", param=prompt_name)
    left_tokens = context_length - prompt_tokens
    asked_tokens = request.max_new_tokens if request.length_name else 1
    if asked_tokens > left_tokens:
        cure = "Shorten the prompt" + (f", or ask for at most {left_tokens}." if left_tokens > 0 else ".")
        param = request.length_name if left_tokens > 0 else prompt_name
        raise ContextTooLong(_three_numbers(context_length, str(prompt_tokens), asked_tokens), cure=cure, param=param)
    return replace(request, max_new_tokens=min(request.max_new_tokens, left_tokens))


def refuse_what_cannot_fit(request: Request, *, least_tokens: int, context_length: int, prompt_name: str) -> None:
    """Raise ContextTooLong for a prompt that has at least `least_tokens` tokens and cannot fit into the context.

    A cheap check for prompts whose tokenisation would hold up other requests; `fit_into_context` decides later.
    """
    if least_tokens >= context_length:
        asked_tokens = request.max_new_tokens if request.length_name else 1
        raise ContextTooLong(
            _three_numbers(context_length, f"at least {least_tokens}", asked_tokens),
            cure="Shorten the prompt.",
            param=prompt_name,
        )


def _three_numbers(context_length: int, prompt_tokens: str, asked_tokens: int) -> str:
    return (
        f"This model's context is {context_length} tokens, but the prompt has {prompt_tokens} and "
        f"{asked_tokens} more {'is' if asked_tokens == 1 else 'are'} asked for."
    )
