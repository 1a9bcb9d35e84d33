"""A request in progress: what the loop is asked for, and the handle by which its HTTP thread hears of the tokens."""

from __future__ import annotations

import queue
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from noodle.errors import NoodleError
from noodle.messages import SamplingParameters, TokenLogprob, TokenScore
from noodle.work_queue import RequestRecord
from services.coordinator.session import FinishReason

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


LOOPBACK = Client("loopback")  # whoever asks on this machine, where no key is needed


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


def session_id_of(request_id: str) -> str:
    """What stages and Valkey know a request by: its id, made unlike that of one that came twice."""
    return f"{request_id[:LONGEST_KEPT_ID]}-{secrets.token_hex(6)}" if request_id else uuid.uuid4().hex


class Generation:
    """A request in progress, as its HTTP thread sees it."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        # Bounded by the tokens the request may generate, one word of its prompt and one at the end.
        self._tokens: queue.SimpleQueue[Token | PromptComputed | NoodleError] = queue.SimpleQueue()

    def next(self, timeout_seconds: float) -> Token | PromptComputed | None:
        """What comes next, None when nothing comes in time; raises what ended the request early."""
        try:
            item = self._tokens.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, NoodleError):
            raise item
        return item

    def cancel(self) -> None:
        """End the request on every stage; harmless when it has ended."""
        self._cancel(self.request_id)

    def put(self, item: Token | PromptComputed | NoodleError) -> None:
        """For the loop: hand one token, the prompt's scores or the error that ends the request to the HTTP thread."""
        self._tokens.put(item)


def record_of(request_id: str, request: GenerationRequest) -> RequestRecord:
    """What Valkey keeps of a request, so that it can be computed again from the start."""
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
    )
