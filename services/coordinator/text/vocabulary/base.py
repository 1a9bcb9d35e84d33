"""What the tokenizer needs of a vocabulary, whichever file it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Piece:
    """A token and its characters [start, stop) in the text; empty for a special token that was added."""

    token_id: int
    start: int
    stop: int


class Vocabulary(Protocol):
    """One model's vocabulary; threads may share it."""

    @property
    def size(self) -> int:
        """Rows of the model's embedding; an id of a text may still be above it."""

    @property
    def longest_token(self) -> int:
        """Characters of the longest token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that a decoded answer leaves out."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts by the names that chat templates use: bos_token, eos_token, ..."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def pieces(self, text: str, add_special_tokens: bool) -> list[Piece]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Ids outside the vocabulary have none; invalid UTF-8 becomes U+FFFD."""

    def token_of(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it."""

    def bytes_of(self, token_id: int) -> bytes:
        """Return a token's bytes, spaces included; empty for an id outside the vocabulary."""
