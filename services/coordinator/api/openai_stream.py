"""A request's answer in OpenAI's shapes, whole or as server-sent events, for chats and completions; knows no routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from noodle.web.service import server_sent_event
from services.coordinator.api import openai_format
from services.coordinator.api.logprobs_format import LogprobsShape, ScoredToken, chat_logprobs, completion_logprobs
from services.coordinator.api.openai_format import AnswerHead
from services.coordinator.api.prompt_echo import scored_prompt
from services.coordinator.api.request_body import JsonObject
from services.coordinator.api.sse import COMMENT, COMMENT_SECONDS, with_errors
from services.coordinator.engine.request import FinishReason
from services.coordinator.text.answer import Answer, Part, kept_alive


@dataclass(frozen=True)
class OpenAIShape:
    """How chat and completions differ."""

    answer: Callable[[AnswerHead, str, FinishReason, dict[str, int], JsonObject | None], JsonObject]
    first_chunk: Callable[[AnswerHead], JsonObject] | None
    text_chunk: Callable[[AnswerHead, str, JsonObject | None], JsonObject]
    last_chunk: Callable[[AnswerHead, FinishReason], JsonObject]
    usage_chunk: Callable[[AnswerHead, dict[str, int]], JsonObject]
    logprobs: LogprobsShape


CHAT = OpenAIShape(
    openai_format.chat_answer,
    openai_format.chat_first_chunk,
    openai_format.chat_text_chunk,
    openai_format.chat_last_chunk,
    openai_format.chat_usage_chunk,
    chat_logprobs,
)
COMPLETION = OpenAIShape(
    openai_format.completion_answer,
    None,
    openai_format.completion_text_chunk,
    openai_format.completion_last_chunk,
    openai_format.completion_usage_chunk,
    completion_logprobs,
)


@dataclass(frozen=True)
class OpenAIAnswer:
    """One request's answer; `echo` is the prompt's text where it is to stand before the answer's."""

    shape: OpenAIShape
    head: AnswerHead
    answer: Answer
    echo: str | None = None

    def whole(self) -> JsonObject:
        """All of it, once it is complete."""
        logprobs = self._logprobs([*self._prompt(), *self._tokens(self.answer.parts)])
        text = (self.echo or "") + self.answer.text
        return self.shape.answer(self.head, text, self.answer.finish_reason, self._usage(), logprobs)

    def events(self) -> Iterator[bytes]:
        """Chunks as they come, usage if asked for, and [DONE]."""
        return with_errors(self.answer, self._events())

    def _events(self) -> Iterator[bytes]:
        echoed = self.echo is None

        def events(part: Part) -> list[bytes]:
            nonlocal echoed
            chunks = [] if echoed else [self._echo_chunk()]  # its scores are here by now
            echoed = True
            if part.text or self.answer.request.want_logprob:
                chunks.append(self._text_chunk(part.text, self._tokens([part])))
            return chunks

        if self.shape.first_chunk is not None:
            yield server_sent_event(self.shape.first_chunk(self.head))
        yield from kept_alive(self.answer, events, COMMENT, COMMENT_SECONDS)
        if not echoed:
            yield self._echo_chunk()
        yield server_sent_event(self.shape.last_chunk(self.head, self.answer.finish_reason))
        if self.head.include_usage:
            yield server_sent_event(self.shape.usage_chunk(self.head, self._usage()))
        yield server_sent_event(openai_format.STREAM_END)

    def _echo_chunk(self) -> bytes:
        return self._text_chunk(self.echo or "", self._prompt())

    def _text_chunk(self, text: str, tokens: Sequence[ScoredToken]) -> bytes:
        return server_sent_event(self.shape.text_chunk(self.head, text, self._logprobs(tokens)))

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> JsonObject | None:
        if not self.answer.request.want_logprob:
            return None
        return self.shape.logprobs(tokens, self.answer.tokenizer.texts)

    def _prompt(self) -> list[ScoredToken]:
        answer, request = self.answer, self.answer.request
        if self.echo is None or not request.score_prompt:
            return []
        return scored_prompt(request.prompt_token_ids, self.echo, answer.prompt_scores, answer.tokenizer)

    def _tokens(self, parts: Sequence[Part]) -> list[ScoredToken]:
        before = len(self.echo or "")
        return [ScoredToken(part.token_id, part.logprob, part.top, before + part.text_offset) for part in parts]

    def _usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answer so far; the end-of-text token counts, it was computed."""
        return openai_format.usage(self.answer.prompt_tokens, len(self.answer.parts))
