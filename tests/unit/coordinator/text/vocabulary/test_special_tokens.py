from __future__ import annotations

import time

from services.coordinator.text.vocabulary.special_tokens import SpecialTokens

IDS = {"<a>": 0, "<a>b": 1, "  ": 2, "    ": 3, "\n": 4, "<unused1>": 5, "<unused12>": 6}


def parts(text: str, **settings: list[int]) -> list[str | int]:
    return [
        text[start:stop] if token_id is None else token_id
        for start, stop, token_id in SpecialTokens(IDS, **settings).split(text)
    ]


def test_the_leftmost_and_there_the_longest_token_is_found() -> None:
    assert parts("x<a>by<a>") == ["x", 1, "y", 0]
    assert parts("       .") == [3, 2, " ."]
    assert parts("<unused12><unused1>2") == [6, 5, "2"]
    assert parts("\n\n<a") == [4, 4, "<a"]
    assert parts("   ") == [2, " "]
    assert parts("") == []


def test_a_token_may_swallow_the_white_space_after_it() -> None:
    assert parts("a<a> \n b", stripping_ids=[0]) == ["a", 0, "b"]
    assert parts("<a>\t", stripping_ids=[0]) == [0]


def test_no_tokens_leave_the_text_whole() -> None:
    assert list(SpecialTokens({}).split("<a>")) == [(0, 3, None)]


def test_a_long_text_of_near_misses_costs_little() -> None:
    ids = {f"<unused{number}>": number for number in range(6000)}
    special = SpecialTokens(ids)
    started = time.process_time()
    assert len(list(special.split("<unused" * 20_000))) == 1
    assert len(list(special.split("<unused7>x" * 20_000))) == 40_000
    assert time.process_time() - started < 5
