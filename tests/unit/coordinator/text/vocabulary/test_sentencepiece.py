"""Merging by scores against its definition, done in the simplest way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from services.coordinator.text.vocabulary.sentencepiece import LONGEST_WORD_KEPT, ScoredMerging

MARK = "\u2581"


def merged(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Merge the best pair, the leftmost of equals, until none is a token."""
    symbols = list(text)
    while True:
        pairs = [
            (-scores[ids[left + right]], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@pytest.mark.parametrize("seed", range(40))
def test_the_best_pair_merges_first_and_the_leftmost_of_equals(seed: int) -> None:
    draw = random.Random(seed)
    letters = "ab" + MARK + "cé"[: seed % 3]
    tokens = [*letters, *{"".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(30)}]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    scores = [-float(draw.randint(0, 12)) for _ in tokens]  # many are equal
    merging = ScoredMerging(ids, scores, None, prefixes_space=False)
    for length in (1, 2, 7, 30, 2 * LONGEST_WORD_KEPT):
        text = "".join(draw.choices(letters.replace(MARK, " "), k=length))
        expected = merged(text.replace(" ", MARK), ids, scores)
        assert [tokens[token_id] for token_id in merging.encode(text)] == expected
        assert [text[start:stop] for _, start, stop in merging.places(text)] == [
            one.replace(MARK, " ") for one in expected
        ]


def test_a_character_that_is_no_token_becomes_its_bytes_or_the_unknown_token() -> None:
    tokens = ["<unk>", MARK, "a", "<0xC3>", "<0xA9>"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    merging = ScoredMerging(ids, [0.0] * len(tokens), 0, prefixes_space=True)
    assert merging.encode("aé") == [1, 2, 3, 4]
    assert merging.places("aé") == [(1, 0, 0), (2, 0, 1), (3, 1, 2), (4, 1, 2)]
    assert merging.encode("b") == [1, 0]


def test_a_token_may_end_in_a_character_that_is_none_itself() -> None:
    ids = {"a": 0, "ab": 1}
    assert ScoredMerging(ids, [0.0, 0.0], None, prefixes_space=False).encode("aab") == [0, 1]


def test_a_token_across_words_is_found() -> None:
    tokens = [MARK, "a", f"a{MARK}a"[:2], f"a{MARK}a"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    assert ScoredMerging(ids, [0.0, 0.0, -1.0, -2.0], None, prefixes_space=False).encode("a a") == [3]
