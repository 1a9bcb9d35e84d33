"""A request in progress: what the loop is asked for, and the handle by which its HTTP thread hears of the tokens."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

from noodle.errors import NoodleError
from noodle.messages import SamplingParameters, TokenLogprob, TokenScore
from noodle.work_queue import RequestRecord
from services.coordinator.scheduler import FinishReason


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
class GenerationRequest:
    """What the loop needs of a request; everything was checked before."""

    prompt_token_ids: list[int]
    maximum_new_tokens: int
    sampling: SamplingParameters
    end_token_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    want_logprob: bool = False
    top_logprobs: int = 0
    score_prompt: bool = False


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
