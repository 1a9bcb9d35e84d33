"""A request's answer in the shapes of /generate, whole or as server-sent events; knows no routes."""

from __future__ import annotations

from collections.abc import Iterator

from noodle.web.service import server_sent_event
from services.coordinator.api import generate_format
from services.coordinator.api.generate_format import GeneratedToken
from services.coordinator.api.request_body import JsonObject
from services.coordinator.api.sse import COMMENT, COMMENT_SECONDS, with_errors
from services.coordinator.text.answer import Answer, Part, kept_alive
from services.coordinator.text.tokenizer import Tokenizer


def generate_answer(answer: Answer, prompt_text: str) -> JsonObject:
    """The whole answer of /generate."""
    details = generate_format.generation_details(
        answer.finish_reason,
        answer.request,
        prompt_tokens=answer.prompt_tokens,
        tokens=[generated_token(part, answer.tokenizer) for part in answer.parts],
        prompt=prompt_tokens(answer) if answer.request.score_prompt else (),
    )
    if answer.request.want_logprob:
        details["prompt_token_ids"] = answer.request.prompt_token_ids
    return generate_format.generate_answer(answer.text, details, prompt_text=prompt_text)


def generate_events(answer: Answer, prompt_text: str, after: int = 0) -> Iterator[bytes]:
    """One event a token, the last one with the whole text and the counts; none of the first `after` tokens.

    Each has its number as its id, so that a client that comes back can say what it has.
    """

    def events(part: Part) -> list[bytes]:
        token, count = generated_token(part, answer.tokenizer), len(answer.parts)
        if count <= after:
            return []
        if part.finish_reason is None:
            event = generate_format.token_event(count, token, answer.request)
            return [server_sent_event(event, event_id=str(count))]
        last = generate_format.last_token_event(
            token,
            answer.text,
            part.finish_reason,
            answer.request,
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=count,
            prompt_text=prompt_text,
        )
        return [server_sent_event(last, event_id=str(count))]

    return with_errors(answer, kept_alive(answer, events, COMMENT, COMMENT_SECONDS))


def generated_token(part: Part, tokenizer: Tokenizer) -> GeneratedToken:
    """A part as /generate shows it."""
    top = tuple(lone_token(each.token_id, each.logprob, tokenizer) for each in part.top)
    return GeneratedToken(part.token_id, part.text, tokenizer.is_special(part.token_id), part.logprob, top)


def lone_token(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> GeneratedToken:
    """A token with its own text, whatever stands beside it."""
    return GeneratedToken(token_id, tokenizer.texts.text_of(token_id), tokenizer.is_special(token_id), logprob)


def prompt_tokens(answer: Answer) -> list[GeneratedToken]:
    """The prompt's tokens with their log-probabilities; the first has none, for nothing is before it."""
    logprobs = [None, *(score.logprob for score in answer.prompt_scores)]
    return [
        lone_token(token_id, logprob, answer.tokenizer)
        for token_id, logprob in zip(answer.request.prompt_token_ids, logprobs, strict=True)
    ]
