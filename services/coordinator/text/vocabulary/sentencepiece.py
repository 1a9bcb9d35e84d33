"""Sentencepiece's merging by scores, as llama.cpp does it: no list of merges, every pair that is a token may merge."""

from __future__ import annotations

import functools
import heapq
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from services.coordinator.text.token_texts import WORD_MARK

WORDS_KEPT = 16_384  # words whose ids are kept
LONGEST_WORD_KEPT = 32  # characters
WORD = re.compile(f"{WORD_MARK}*[^{WORD_MARK}]+|{WORD_MARK}+")


class ScoredMerging:
    """Cuts a text into tokens; threads may share it.

    The pair with the best score merges first, the leftmost of equals, until no two neighbours are a token. A character
    that is no token becomes the tokens of its UTF-8 bytes, or else the unknown token.
    """

    def __init__(
        self, ids: Mapping[str, int], scores: Sequence[float], unknown_id: int | None, *, prefixes_space: bool
    ) -> None:
        self._ids, self._scores, self._unknown_id = ids, scores, unknown_id
        self._prefix = WORD_MARK if prefixes_space else ""
        # without a token across words, each word can be cut by itself
        self._cuts_words = not any(WORD_MARK in token.lstrip(WORD_MARK) for token in ids)
        self._kept_ids_of = functools.lru_cache(maxsize=WORDS_KEPT)(self._ids_of)

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for word in self._words(text):
            found += self._kept_ids_of(word) if len(word) <= LONGEST_WORD_KEPT else self._ids_of(word)
        return found

    def places(self, text: str) -> list[tuple[int, int, int]]:
        """Return for each token its id and its characters [start, stop) in the text."""
        start = -len(self._prefix)
        found: list[tuple[int, int, int]] = []
        for symbol in itertools.chain.from_iterable(map(self._symbols, self._words(text))):
            stop = start + len(symbol)
            found += [(token_id, max(0, start), stop) for token_id in self._ids_of_symbol(symbol)]
            start = stop
        return found

    def _words(self, text: str) -> list[str]:
        marked = self._prefix + text.replace(" ", WORD_MARK)
        return WORD.findall(marked) if self._cuts_words else [marked]

    def _ids_of(self, word: str) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(map(self._ids_of_symbol, self._symbols(word))))

    def _ids_of_symbol(self, symbol: str) -> list[int]:
        token_id = self._ids.get(symbol)
        if token_id is not None:
            return [token_id]
        of_bytes = [self._ids.get(f"<0x{byte:02X}>", self._unknown_id) for byte in symbol.encode()]
        return [token_id for token_id in of_bytes if token_id is not None]

    def _symbols(self, word: str) -> Iterator[str]:
        if word in self._ids and len(word) == 1:
            return iter([word])
        symbols = list(word)  # a symbol that was merged into the one before it is empty
        before = [*range(-1, len(symbols) - 1)]
        after = [*range(1, len(symbols)), -1]
        pairs: list[tuple[float, int, int, int]] = []
        for right in range(1, len(symbols)):
            self._add_pair(pairs, symbols, right - 1, right)
        while pairs:
            _, left, right, length = heapq.heappop(pairs)
            merged = symbols[left] + symbols[right]
            if not symbols[left] or not symbols[right] or len(merged) != length:
                continue  # one of the two has merged with another since
            symbols[left], symbols[right] = merged, ""
            after[left] = following = after[right]
            if following >= 0:
                before[following] = left
                self._add_pair(pairs, symbols, left, following)
            if before[left] >= 0:
                self._add_pair(pairs, symbols, before[left], left)
        return filter(None, symbols)

    def _add_pair(self, pairs: list[tuple[float, int, int, int]], symbols: list[str], left: int, right: int) -> None:
        merged = symbols[left] + symbols[right]
        token_id = self._ids.get(merged)
        if token_id is not None:
            heapq.heappush(pairs, (-self._scores[token_id], left, right, len(merged)))
