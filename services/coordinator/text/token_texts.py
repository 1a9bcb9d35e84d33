"""The bytes and the names of single tokens, for log-probabilities."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_MARK = "\u2581"  # ▁, how sentencepiece writes a space


class TokenBytes:
    """The bytes of each token of a tokenizers library's vocabulary by itself; threads may share it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        kinds = _kinds(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder is not None else set()
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._word_mark = not self._byte_level and bool(kinds & {"Metaspace", "Replace"})

    def of(self, token_id: int) -> bytes:
        """Return the token's bytes, spaces included; empty for an id outside the vocabulary."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in byte_of_character() for character in token):
            return bytes(byte_of_character()[character] for character in token)
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._word_mark:
            return token.replace(WORD_MARK, " ").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


class TokenTexts:
    """The text of each token of a vocabulary by itself, for ids that `bytes_of` knows; threads may share it."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self.bytes_of = bytes_of

    def text_of(self, token_id: int) -> str:
        """Return the token as text, with U+FFFD for a part of a character."""
        return self.bytes_of(token_id).decode(errors="replace")

    def name_of(self, token_id: int) -> str:
        """Return the token as text; a part of a character as `bytes:\\xf0\\x9f`, as OpenAI writes it."""
        raw = self.bytes_of(token_id)
        if not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@cache
def byte_of_character() -> dict[str, int]:
    """Return how byte-level vocabularies write bytes: printable ones as themselves, others from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _kinds(decoder: dict[str, object]) -> set[str]:
    inner = decoder.get("decoders")
    kinds = {str(decoder.get("type"))}
    for each in inner if isinstance(inner, list) else []:
        kinds |= _kinds(each)
    return kinds
