"""Byte-pair merging by a list of merges, as GGUF files hold it, on the tokenizers library."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import BPE

from noodle.errors import UnsupportedModel
from services.coordinator.text.vocabulary.pre_tokenizers import PreTokenizer

WORD_MARK = "\u2581"  # ▁, how vocabularies that are not byte-level write a space
LINES = re.compile(r"[^\n]+|\n+")

log = logging.getLogger(__name__)


class RankedMerging:
    """Cuts a text into tokens; threads may share it.

    `ids` holds every token of the file. A vocabulary that is not byte-level writes spaces as ▁ and has tokens for
    bytes; a run of line ends that is a token there is not merged from its characters.
    """

    def __init__(self, ids: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer) -> None:
        self._is_byte_level = pre.is_byte_level
        self._line_ends = {token: token_id for token, token_id in ids.items() if not token.strip("\n")}
        with _without_collection():
            model = BPE(
                vocab=ids,
                merges=merges,
                ignore_merges=pre.ignores_merges,
                byte_fallback=not pre.is_byte_level,
            )
        self._tokenizer = tokenizers.Tokenizer(model)
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


def read_merges(lines: Sequence[object], ids: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """Split each line into its two tokens, at the first space after its first character.

    A merge that is listed twice counts at its first place. One of tokens that the vocabulary lacks can never produce a
    token; it is left out, and the log says so. Raises UnsupportedModel for a line that is not two tokens.
    """
    merges: dict[tuple[str, str], None] = {}
    lost = 0
    with _without_collection():
        for number, line in enumerate(lines):
            at = line.find(" ", 1) if isinstance(line, str) else -1
            if not isinstance(line, str) or at < 0:
                raise UnsupportedModel(
                    f"{path}: merge {number} of tokenizer.ggml.merges is not two tokens: {str(line)[:60]!r}.",
                    cure="Fetch the file again, or another GGUF file of this model.",
                )
            first, second = line[:at], line[at + 1 :]
            if first in ids and second in ids and first + second in ids:
                merges.setdefault((first, second))
            else:
                lost += 1
    if lost:
        log.warning("%s: %d of %d merges name tokens that the vocabulary lacks; left out", path, lost, len(lines))
    return list(merges)


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
