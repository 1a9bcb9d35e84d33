"""Writes a request's answer in OpenAI's formats, whole or as server-sent events, for chats and completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from msgspec import UNSET

from noodle.wire.messages import TokenLogprob, TokenScore
from services.coordinator.api.openai_types import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatScore,
    ChatTokenScore,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Reason,
    Usage,
)
from services.coordinator.api.sse import STREAM_END, kept_alive, server_sent_event, with_errors
from services.coordinator.engine.request import FinishReason
from services.coordinator.text.answer import Answer, Part
from services.coordinator.text.detokenizer import text_offsets
from services.coordinator.text.token_texts import TokenTexts
from services.coordinator.text.tokenizer import Tokenizer

FINISH_REASONS: dict[FinishReason, Reason] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


class CompletionWriter:
    """The answer of one request to /v1/completions; that of a chat differs in its choices and log-probabilities."""

    chunk_type: type[ChatChunk | CompletionAnswer] = CompletionAnswer

    def __init__(self, answer: Answer, model_name: str, echo: str | None = None) -> None:
        self.answer = answer
        self._echo = echo  # the prompt's text, if it precedes the answer's
        self._head: dict[str, Any] = {
            "id": answer.request.answer_id,
            "created": answer.request.created_unix_seconds,
            "model": model_name,
            "seed": answer.request.seed,
        }

    def whole(self) -> CompletionAnswer | ChatAnswer:
        """The complete answer."""
        logprobs = self._logprobs([*self._prompt(), *self._tokens(self.answer.parts)])
        text = (self._echo or "") + self.answer.text
        return self._whole(text, FINISH_REASONS[self.answer.finish_reason], logprobs)

    def events(self) -> Iterator[bytes]:
        """Chunks as they come, usage if it was asked for, and [DONE]."""
        return with_errors(self.answer, self._events())

    def _events(self) -> Iterator[bytes]:
        is_echoed = self._echo is None

        def events(part: Part) -> list[bytes]:
            nonlocal is_echoed
            chunks = [] if is_echoed else [self._echo_chunk()]  # its scores are here by now
            is_echoed = True
            if part.text or self.answer.request.want_logprob:
                chunks.append(self._text_chunk(part.text, self._tokens([part])))
            return chunks

        for first in self._first_choices():
            yield self._event([first])
        yield from kept_alive(self.answer, events)
        if not is_echoed:
            yield self._echo_chunk()
        yield self._event([self._choice(None, reason=FINISH_REASONS[self.answer.finish_reason])])
        if self.answer.request.include_usage:
            yield self._event([], self._usage())
        yield server_sent_event(STREAM_END)

    def _event(self, choices: list[Any], usage: Usage | None = None) -> bytes:
        """A chunk. With `include_usage` each has a usage, null in all but the last."""
        shown = usage if self.answer.request.include_usage else UNSET
        return server_sent_event(self.chunk_type(**self._head, choices=choices, usage=shown))

    def _echo_chunk(self) -> bytes:
        return self._text_chunk(self._echo or "", self._prompt())

    def _text_chunk(self, text: str, tokens: Sequence[Part]) -> bytes:
        return self._event([self._choice(text, self._logprobs(tokens))])

    def _logprobs(self, tokens: Sequence[Part]) -> Any:
        if not self.answer.request.want_logprob:
            return None
        return self._scores(tokens, self.answer.tokenizer.texts)

    def _prompt(self) -> list[Part]:
        answer, request = self.answer, self.answer.request
        if self._echo is None or not request.score_prompt:
            return []
        return scored_prompt(request.prompt_token_ids, self._echo, answer.prompt_scores, answer.tokenizer)

    def _tokens(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Parts with their places in the whole text of the choice."""
        before = len(self._echo or "")
        return [replace(part, text_offset=before + part.text_offset) for part in parts] if before else parts

    def _usage(self) -> Usage:
        prompt, completion = self.answer.prompt_tokens, len(self.answer.parts)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _whole(self, text: str, reason: Reason, logprobs: Any) -> CompletionAnswer | ChatAnswer:
        return CompletionAnswer(**self._head, choices=[self._choice(text, logprobs, reason)], usage=self._usage())

    def _choice(self, text: str | None, logprobs: Any = None, reason: Reason | None = None) -> Any:
        """The choice of a chunk; the last one has a reason and no text."""
        return CompletionChoice(text=text or "", logprobs=logprobs, finish_reason=reason)

    def _first_choices(self) -> list[Any]:
        return []

    def _scores(self, tokens: Sequence[Part], texts: TokenTexts) -> Any:
        return completion_logprobs(tokens, texts)


class ChatWriter(CompletionWriter):
    """The answer of one request to /v1/chat/completions; its first chunk names the role."""

    chunk_type = ChatChunk

    def _whole(self, text: str, reason: Reason, logprobs: Any) -> ChatAnswer:
        choice = ChatChoice(message=AnswerMessage(content=text), logprobs=logprobs, finish_reason=reason)
        return ChatAnswer(**self._head, choices=[choice], usage=self._usage())

    def _choice(self, text: str | None, logprobs: Any = None, reason: Reason | None = None) -> ChatChunkChoice:
        delta = Delta() if text is None else Delta(content=text)
        return ChatChunkChoice(delta=delta, logprobs=logprobs, finish_reason=reason)

    def _first_choices(self) -> list[Any]:
        return [ChatChunkChoice(delta=Delta(role="assistant", content=""))]

    def _scores(self, tokens: Sequence[Part], texts: TokenTexts) -> ChatLogprobs:
        return chat_logprobs(tokens, texts)


def scored_prompt(
    token_ids: Sequence[int], text: str, scores: Sequence[TokenScore], tokenizer: Tokenizer
) -> list[Part]:
    """The tokens of a prompt as parts without texts; `scores` begin with the second token's.

    Offsets are counted back from the text's end: a mark that the tokenizer puts in front is not part of it.
    """
    whole, offsets = text_offsets(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), token_ids)
    shift = len(whole) - len(text)
    parts = [Part(token_ids[0], text="", logprob=None, finish_reason=None)]  # nothing precedes it
    for token_id, score, offset in zip(token_ids[1:], scores, offsets[1:], strict=True):
        place = max(0, offset - shift)
        parts.append(Part(token_id, "", score.logprob, None, top=tuple(score.top), text_offset=place))
    return parts


def completion_logprobs(tokens: Sequence[Part], texts: TokenTexts) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[texts.name_of(token.token_id) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_by_name(token, texts) for token in tokens],
        text_offset=[token.text_offset for token in tokens],
    )


def chat_logprobs(tokens: Sequence[Part], texts: TokenTexts) -> ChatLogprobs:
    content = []
    for token in tokens:
        top = [ChatScore(**_named(each.token_id, each.logprob, texts)) for each in token.top]
        content.append(ChatTokenScore(**_named(token.token_id, token.logprob, texts), top_logprobs=top))
    return ChatLogprobs(content=content)


def _by_name(token: Part, texts: TokenTexts) -> dict[str, float] | None:
    """The likeliest tokens first, then the token itself; of two tokens with one name the likelier stays."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for each in (*token.top, TokenLogprob(token.token_id, token.logprob)):
        named.setdefault(texts.name_of(each.token_id), each.logprob)
    return named


def _named(token_id: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.name_of(token_id), "logprob": logprob, "bytes": list(texts.bytes_of(token_id))}
