"""Byte-pair merging by a list of merges, as GGUF files hold it, on the tokenizers library."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import BPE

from noodle.errors import UnsupportedModel
from services.coordinator.text.token_texts import WORD_MARK
from services.coordinator.text.vocabulary.pre_tokenizers import PreTokenizer

CURE = "Fetch the file again, or another GGUF file of this model."
LINES = re.compile(r"[^\n]+|\n+")

log = logging.getLogger(__name__)


class RankedMerging:
    """Cuts a text into tokens; threads may share it.

    `ids` holds every token of the file. A vocabulary that is not byte-level writes spaces as ▁ and has tokens for
    bytes; a run of line ends that is a token there is not merged from its characters.
    """

    def __init__(self, ids: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer, path: Path) -> None:
        """Raises UnsupportedModel if the library refuses the merges; `path` is named then."""
        self._is_byte_level = pre.is_byte_level
        self._line_ends = {token: token_id for token, token_id in ids.items() if not token.strip("\n")}
        self._tokenizer = tokenizers.Tokenizer(_model(ids, merges, pre, path))
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
        last = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if pre.is_byte_level else []
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, *last])

    def encode(self, text: str) -> list[int]:
        if self._is_byte_level:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        return [token_id for token_id, _, _ in self.places(text)]

    def places(self, text: str) -> list[tuple[int, int, int]]:
        """Return for each token its id and its characters [start, stop) in the text."""
        if self._is_byte_level:
            return self._merge(text, 0)
        found: list[tuple[int, int, int]] = []
        for line in LINES.finditer(text.replace(" ", WORD_MARK)):
            token_id = self._line_ends.get(line[0])
            found += self._merge(line[0], line.start()) if token_id is None else [(token_id, *line.span())]
        return found

    def _merge(self, text: str, at: int) -> list[tuple[int, int, int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [(token_id, at + start, at + stop) for token_id, (start, stop) in places]


def read_merges(lines: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Split each line into its two tokens, at the first space after its first character.

    A merge that is listed twice counts at its first place. Raises UnsupportedModel for a line that is not two tokens.
    """
    lines = list(dict.fromkeys(lines))
    with _without_collection():
        merges = [(line[:at], line[at + 1 :]) for line in lines if (at := line.find(" ", 1)) > 0]
    if len(merges) == len(lines):
        return merges
    number, line = next((number, line) for number, line in enumerate(lines) if line.find(" ", 1) < 0)
    raise UnsupportedModel(
        f"{path}: merge {number} of tokenizer.ggml.merges is not two tokens: {line[:60]!r}.",
        cure=CURE,
    )


def _model(ids: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer, path: Path) -> BPE:
    """Build the library's model. Merges of tokens that the vocabulary lacks can never produce a token: left out."""
    settings = {"ignore_merges": pre.ignores_merges, "byte_fallback": not pre.is_byte_level}
    with _without_collection():
        try:
            return BPE(vocab=ids, merges=merges, **settings)
        except Exception as error:  # the library raises nothing more specific
            kept = [pair for pair in merges if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids]
            if len(kept) == len(merges):
                raise UnsupportedModel(f"{path}: its merges cannot be used: {error}.", cure=CURE) from error
            lost = len(merges) - len(kept)
            log.warning("%s: %d of %d merges name tokens that it lacks; left out", path, lost, len(merges))
            return BPE(vocab=ids, merges=kept, **settings)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Build large tables without Python's search for circles among them, which costs more than the tables."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
