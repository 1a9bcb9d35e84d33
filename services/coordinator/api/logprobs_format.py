"""Log-probabilities as OpenAI's clients read them, in the shape of completions and in that of chats; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from noodle.wire.messages import TokenLogprob
from services.coordinator.api.request_body import JsonObject
from services.coordinator.text.token_texts import TokenTexts


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token of a prompt or an answer; the first of a prompt has no log-probability, for nothing is before it."""

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int = 0  # characters before it in the text of the choice


LogprobsShape = Callable[[Sequence[ScoredToken], TokenTexts], JsonObject]


def completion_logprobs(tokens: Sequence[ScoredToken], texts: TokenTexts) -> JsonObject:
    """Four lists of one length. Each of `top_logprobs` also has the token itself, likely or not."""
    return {
        "tokens": [texts.name_of(token.token_id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_name(token, texts) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], texts: TokenTexts) -> JsonObject:
    """One object a token, with the likeliest at its place."""
    content = [
        {
            **_chat_token(token.token_id, token.logprob, texts),
            "top_logprobs": [_chat_token(each.token_id, each.logprob, texts) for each in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _by_name(token: ScoredToken, texts: TokenTexts) -> dict[str, float] | None:
    """Likeliest first; of two tokens with one name the likelier stands."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for each in (*token.top, TokenLogprob(token.token_id, token.logprob)):
        named.setdefault(texts.name_of(each.token_id), each.logprob)
    return named


def _chat_token(token_id: int, logprob: float | None, texts: TokenTexts) -> JsonObject:
    return {"token": texts.name_of(token_id), "logprob": logprob, "bytes": list(texts.bytes_of(token_id))}
