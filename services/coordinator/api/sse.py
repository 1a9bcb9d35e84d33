"""What both forms of event streams share: a request on its way, and errors after the first byte; knows no routes.

An error after the first byte travels in the stream, as an `error` event with OpenAI's error object. The streams
themselves are in openai_stream.py and generate_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from noodle.errors import GenerationFailed, NoodleError
from noodle.web.service import error_object, server_sent_event
from services.coordinator.engine.parameters import FinishReason, GenerationParameters
from services.coordinator.text.answer import Answer
from services.coordinator.text.tokenizer import Tokenizer

COMMENT = b": waiting\n\n"
COMMENT_SECONDS = 1.0


@dataclass(frozen=True)
class Started:
    """A request on its way."""

    answer: Answer
    parameters: GenerationParameters
    prompt_token_ids: list[int]
    tokenizer: Tokenizer
    answer_id: str = ""  # in OpenAI's shapes
    created_seconds: int = 0  # Unix time, when the request came first

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.prompt_token_ids)

    @property
    def finish_reason(self) -> FinishReason:
        """Why a complete answer ended."""
        if self.answer.finish_reason is None:
            raise GenerationFailed("The answer was formatted before its end.")
        return self.answer.finish_reason


def with_errors(started: Started, events: Iterator[bytes]) -> Iterator[bytes]:
    """The events, or what ended them early as one more event; the request is cancelled whatever happens."""
    try:
        yield from events
    except NoodleError as error:
        yield server_sent_event({"error": error_object(error)}, "error")
    finally:
        started.answer.generation.cancel()
