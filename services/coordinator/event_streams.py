"""An answer as bytes, whole or as server-sent events, in OpenAI's shapes and in /generate's; knows no routes.

An error after the first byte travels in the stream, as an `error` event with OpenAI's error object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from noodle.errors import GenerationFailed, NoodleError
from noodle.web import error_object, server_sent_event
from services.coordinator import generate_format, openai_format
from services.coordinator.answer import Answer, Part, kept_alive
from services.coordinator.generate_format import GeneratedToken
from services.coordinator.openai_format import AnswerHead
from services.coordinator.parameters import FinishReason, GenerationParameters
from services.coordinator.request_body import JsonObject
from services.coordinator.tokenizer import Tokenizer

COMMENT = b": waiting\n\n"
COMMENT_SECONDS = 1.0


@dataclass(frozen=True)
class Started:
    """A request on its way."""

    answer: Answer
    parameters: GenerationParameters
    prompt_tokens: int
    prompt_token_ids: list[int]

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answer so far; the end-of-text token counts, it was computed."""
        return openai_format.usage(self.prompt_tokens, len(self.answer.parts))


@dataclass(frozen=True)
class OpenAIShape:
    """How chat and completions differ."""

    answer: Callable[[AnswerHead, str, FinishReason, dict[str, int]], JsonObject]
    first_chunk: Callable[[AnswerHead], JsonObject] | None
    text_chunk: Callable[[AnswerHead, str], JsonObject]
    last_chunk: Callable[[AnswerHead, FinishReason], JsonObject]
    usage_chunk: Callable[[AnswerHead, dict[str, int]], JsonObject]


CHAT = OpenAIShape(
    openai_format.chat_answer,
    openai_format.chat_first_chunk,
    openai_format.chat_text_chunk,
    openai_format.chat_last_chunk,
    openai_format.chat_usage_chunk,
)
COMPLETION = OpenAIShape(
    openai_format.completion_answer,
    None,
    openai_format.completion_text_chunk,
    openai_format.completion_last_chunk,
    openai_format.completion_usage_chunk,
)


def now_seconds() -> int:
    """Unix time, for OpenAI's `created`."""
    return int(time.time())


def openai_answer(shape: OpenAIShape, head: AnswerHead, started: Started) -> JsonObject:
    """The whole answer."""
    return shape.answer(head, started.answer.text, reason_of(started), started.usage)


def openai_events(shape: OpenAIShape, head: AnswerHead, started: Started) -> Iterator[bytes]:
    """Chunks, usage if asked for, and [DONE]."""

    def events(part: Part) -> list[bytes]:
        return [server_sent_event(shape.text_chunk(head, part.text))] if part.text else []

    def stream() -> Iterator[bytes]:
        if shape.first_chunk is not None:
            yield server_sent_event(shape.first_chunk(head))
        yield from kept_alive(started.answer, events, COMMENT, COMMENT_SECONDS)
        yield server_sent_event(shape.last_chunk(head, reason_of(started)))
        if head.include_usage:
            yield server_sent_event(shape.usage_chunk(head, started.usage))
        yield server_sent_event(openai_format.STREAM_END)

    return with_errors(started, stream())


def generate_answer(started: Started, tokenizer: Tokenizer, prompt_text: str) -> JsonObject:
    """The whole answer of /generate."""
    tokens = [generated_token(part, tokenizer) for part in started.answer.parts]
    details = generate_format.generation_details(
        reason_of(started), started.parameters, prompt_tokens=started.prompt_tokens, tokens=tokens
    )
    if started.parameters.logprobs:
        details["prompt_token_ids"] = started.prompt_token_ids
    return generate_format.generate_answer(started.answer.text, details, prompt_text=prompt_text)


def generate_events(started: Started, tokenizer: Tokenizer, prompt_text: str) -> Iterator[bytes]:
    """One event a token, the last one with the whole text and the counts."""

    def events(part: Part) -> list[bytes]:
        token, count = generated_token(part, tokenizer), len(started.answer.parts)
        if part.finish_reason is None:
            return [server_sent_event(generate_format.token_event(count, token, started.parameters))]
        last = generate_format.last_token_event(
            token,
            started.answer.text,
            part.finish_reason,
            started.parameters,
            prompt_tokens=started.prompt_tokens,
            generated_tokens=count,
            prompt_text=prompt_text,
        )
        return [server_sent_event(last)]

    return with_errors(started, kept_alive(started.answer, events, COMMENT, COMMENT_SECONDS))


def with_errors(started: Started, events: Iterator[bytes]) -> Iterator[bytes]:
    """The events, or what ended them early as one more event; the request is cancelled whatever happens."""
    try:
        yield from events
    except NoodleError as error:
        yield server_sent_event({"error": error_object(error)}, "error")
    finally:
        started.answer.generation.cancel()


def generated_token(part: Part, tokenizer: Tokenizer) -> GeneratedToken:
    """A part as /generate shows it."""
    return GeneratedToken(part.token_id, part.text, tokenizer.is_special(part.token_id), part.logprob)


def reason_of(started: Started) -> FinishReason:
    """Why a complete answer ended."""
    if started.answer.finish_reason is None:
        raise GenerationFailed("The answer was formatted before its end.")
    return started.answer.finish_reason
