"""OpenAI's answers for chat, completions and models, whole and in chunks; knows no HTTP and no generation.

Every answer carries one field more than OpenAI's: `seed`, the one that was used, so that it can be asked for again.
Chunks are plain objects; a stream ends with the text `STREAM_END`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from services.coordinator.api.openai_request import unknown_model
from services.coordinator.api.request_body import JsonObject
from services.coordinator.coordinator import ServedModel
from services.coordinator.engine.request import FinishReason

STREAM_END = "[DONE]"
FINISH_REASONS: dict[FinishReason, str] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@dataclass(frozen=True)
class AnswerHead:
    """What all parts of one answer share."""

    id: str
    model: str
    created_seconds: int
    seed: int
    include_usage: bool = False

    def fields(self, kind: str) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_seconds,
            "model": self.model,
            "seed": self.seed,
        }


def new_chat_id() -> str:
    return f"chatcmpl-{secrets.token_hex(16)}"


def new_completion_id() -> str:
    return f"cmpl-{secrets.token_hex(16)}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_answer(
    head: AnswerHead, text: str, reason: FinishReason, used: dict[str, int], logprobs: JsonObject | None = None
) -> JsonObject:
    """A whole answer of /v1/chat/completions."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": FINISH_REASONS[reason],
    }
    return {**head.fields("chat.completion"), "choices": [choice], "usage": used}


def chat_first_chunk(head: AnswerHead) -> JsonObject:
    """Opens the stream: it says who speaks."""
    return _chat_chunk(head, {"role": "assistant", "content": ""}, None)


def chat_text_chunk(head: AnswerHead, text: str, logprobs: JsonObject | None = None) -> JsonObject:
    return _chat_chunk(head, {"content": text}, None, logprobs)


def chat_last_chunk(head: AnswerHead, reason: FinishReason) -> JsonObject:
    return _chat_chunk(head, {}, FINISH_REASONS[reason])


def chat_usage_chunk(head: AnswerHead, used: dict[str, int]) -> JsonObject:
    """Comes after the last chunk when `include_usage` is set."""
    return {**head.fields("chat.completion.chunk"), "choices": [], "usage": used}


def _chat_chunk(
    head: AnswerHead, delta: dict[str, str], reason: str | None, logprobs: JsonObject | None = None
) -> JsonObject:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    chunk = {**head.fields("chat.completion.chunk"), "choices": [choice]}
    return {**chunk, "usage": None} if head.include_usage else chunk


def completion_answer(
    head: AnswerHead, text: str, reason: FinishReason, used: dict[str, int], logprobs: JsonObject | None = None
) -> JsonObject:
    """A whole answer of /v1/completions."""
    return {**_completion(head, text, FINISH_REASONS[reason], logprobs), "usage": used}


def completion_text_chunk(head: AnswerHead, text: str, logprobs: JsonObject | None = None) -> JsonObject:
    return _completion_chunk(head, text, None, logprobs)


def completion_last_chunk(head: AnswerHead, reason: FinishReason) -> JsonObject:
    return _completion_chunk(head, "", FINISH_REASONS[reason])


def completion_usage_chunk(head: AnswerHead, used: dict[str, int]) -> JsonObject:
    """Comes after the last chunk when `include_usage` is set."""
    return {**head.fields("text_completion"), "choices": [], "usage": used}


def _completion(head: AnswerHead, text: str, reason: str | None, logprobs: JsonObject | None) -> JsonObject:
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
    return {**head.fields("text_completion"), "choices": [choice]}


def _completion_chunk(
    head: AnswerHead, text: str, reason: str | None, logprobs: JsonObject | None = None
) -> JsonObject:
    chunk = _completion(head, text, reason, logprobs)
    return {**chunk, "usage": None} if head.include_usage else chunk


def model_object(name: str, served: ServedModel) -> JsonObject:
    """OpenAI's model object; raises UnknownModel for a name that is not served."""
    if name not in served.names:
        raise unknown_model(name, served)
    return {"id": name, "object": "model", "created": served.created_seconds, "owned_by": "noodle"}


def model_list(served: ServedModel) -> JsonObject:
    """OpenAI's list of models, one entry for each name."""
    return {"object": "list", "data": [model_object(name, served) for name in served.names]}
