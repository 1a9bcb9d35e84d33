"""The shapes of /tokenize, as text-generation-inference has them; knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.coordinator.api.request_body import (
    JsonObject,
    decode_object,
    read_boolean,
    refuse_what_is_not_honoured,
    wrong_type,
)
from services.coordinator.text.token_texts import TokenTexts
from services.coordinator.text.tokenizer import Piece


@dataclass(frozen=True)
class TokenizeRequest:
    """A checked body of /tokenize."""

    text: str
    add_special_tokens: bool


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Check a body; raises InvalidRequest naming the field."""
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, {"inputs", "add_special_tokens"}, {})
    text = fields.get("inputs")
    if not isinstance(text, str):
        wrong_type("inputs", "a string", text)
    return TokenizeRequest(text, read_boolean(fields, "add_special_tokens", default=True))


def tokenize_answer(text: str, pieces: Sequence[Piece], texts: TokenTexts) -> list[JsonObject]:
    """One object a token; a mark that the tokenizer added has its own text and no place."""
    return [
        {
            "id": piece.token_id,
            "text": text[piece.start : piece.stop] or texts.name_of(piece.token_id),
            "start": piece.start,
            "stop": piece.stop,
        }
        for piece in pieces
    ]
