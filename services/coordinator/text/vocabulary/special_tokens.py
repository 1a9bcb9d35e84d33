"""Finds a vocabulary's special tokens in a text, which are never cut and never merged with their neighbours."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

START = 2  # characters by which the beginning of a special token is looked for
STRIPPED = " \t\n\v\f\r"


class SpecialTokens:
    """Splits text at the leftmost and there longest special token; the work grows with the text's length alone.

    `stripping_ids` are tokens that swallow the white space after them.
    """

    def __init__(self, ids: Mapping[str, int], stripping_ids: Collection[int] = ()) -> None:
        self._ids, self._stripping_ids = ids, frozenset(stripping_ids)
        lengths: dict[str, set[int]] = {}
        for token in ids:
            lengths.setdefault(token[:START], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._start = re.compile("|".join(map(re.escape, sorted(lengths, reverse=True)))) if lengths else None

    def split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Yield the parts of a text as (start, stop, id); the id is None for ordinary text."""
        done = at = 0
        while self._start is not None and (found := self._start.search(text, at)):
            at = found.start()
            token_id, length = self._longest_at(text, at)
            if token_id is None:
                at += 1
                continue
            if at > done:
                yield done, at, None
            at += length
            yield at - length, at, token_id
            if token_id in self._stripping_ids:
                while at < len(text) and text[at] in STRIPPED:
                    at += 1
            done = at
        if done < len(text):
            yield done, len(text), None

    def _longest_at(self, text: str, at: int) -> tuple[int | None, int]:
        for characters in range(START, 0, -1):
            start = text[at : at + characters]
            for length in self._lengths.get(start, ()) if len(start) == characters else ():
                token = text[at : at + length]  # shorter at the text's end
                if token in self._ids:
                    return self._ids[token], len(token)
        return None, 0
