"""Text comes in whole characters, without delay, and equals the decoded whole in the end."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from services.coordinator.text.detokenizer import (
    MAXIMUM_WINDOW_TOKENS,
    Detokenizer,
    StopStrings,
    TextStream,
)
from services.coordinator.text.tokenizer import Tokenizer
from tests.support.models.made_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from tests.support.models.real_model import real_model_folder

REPLACEMENT = "\ufffd"
TEXTS = [
    "hello world",
    "  hello   world ",
    "",
    " ",
    "naïve café, 你好, 👩‍👩‍👧‍👦 and €€€",
    "😀😀😀a😀",
    f"a real {REPLACEMENT} replacement character {REPLACEMENT}, {REPLACEMENT}",
    f"it ends with one {REPLACEMENT}",
    "\n\n\t code():\n    pass\n",
]


@pytest.fixture(scope="module")
def byte_level() -> RawTokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> RawTokenizer:
    return sentencepiece_tokenizer()


def stream_all(
    tokenizer: RawTokenizer | Tokenizer, ids: list[int], *, skip_special_tokens: bool = True, **options: Any
) -> tuple[list[str], str]:
    """The deltas of a whole stream, and their concatenation."""
    decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    stream = TextStream(decode, **options)
    deltas = []
    for token_id in ids:
        deltas.append(stream.push(token_id))
        if stream.finished:
            return deltas, "".join(deltas)
    deltas.append(stream.finish())
    return deltas, "".join(deltas)


def random_ids(generator: random.Random, vocabulary_size: int) -> list[int]:
    """Runs of one token, of few and of any, as a model writes them at a high temperature or in a loop."""
    ids: list[int] = []
    for _ in range(generator.randrange(1, 6)):
        choice = generator.random()
        pool = [generator.randrange(vocabulary_size) for _ in range(1 if choice < 0.2 else 3 if choice < 0.5 else 500)]
        ids += [generator.choice(pool) for _ in range(generator.randrange(1, 60))]
    return ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_text_comes_out_as_it_went_in(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: RawTokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas, whole = stream_all(tokenizer, ids)
    assert whole == tokenizer.decode(ids) == text
    for delta in deltas:
        if REPLACEMENT not in text:
            assert REPLACEMENT not in delta


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_any_ids_of_a_byte_level_vocabulary_give_the_decoded_whole(
    byte_level: RawTokenizer, skip_special_tokens: bool
) -> None:
    generator = random.Random(20)
    size = byte_level.get_vocab_size() + 3  # some outside the vocabulary
    for _ in range(600):
        ids = random_ids(generator, size)
        _, whole = stream_all(byte_level, ids, skip_special_tokens=skip_special_tokens)
        assert whole == byte_level.decode(ids, skip_special_tokens=skip_special_tokens), ids


def test_any_ids_that_are_text_in_a_sentencepiece_vocabulary_give_the_decoded_whole(
    sentencepiece: RawTokenizer,
) -> None:
    generator = random.Random(21)
    words = [[token_id] for token_id in range(sentencepiece.get_vocab_size()) if not 3 <= token_id < 259] + [
        [3 + byte for byte in character.encode()] for character in "é€😀你\n"
    ]
    for _ in range(600):
        pool = [generator.choice(words) for _ in range(generator.choice([1, 2, 200]))]
        ids = [token_id for _ in range(generator.randrange(1, 90)) for token_id in generator.choice(pool)]
        _, whole = stream_all(sentencepiece, ids)
        assert whole == sentencepiece.decode(ids), ids


def test_broken_bytes_of_a_sentencepiece_vocabulary_spoil_only_what_follows_the_last_whole_character(
    sentencepiece: RawTokenizer,
) -> None:
    euro = [3 + byte for byte in "€".encode()]
    a = sentencepiece.token_to_id("a")
    _, whole = stream_all(sentencepiece, [*euro, euro[0], euro[1], a, a])
    assert whole == f"€{REPLACEMENT}{REPLACEMENT}aa"
    _, whole = stream_all(sentencepiece, [*euro, euro[0]])
    assert whole == f"€{REPLACEMENT}"
    _, whole = stream_all(sentencepiece, [3 + 0xFF] * 100)
    assert whole == REPLACEMENT * 100


def test_random_bytes_of_a_sentencepiece_vocabulary_lose_no_letter(sentencepiece: RawTokenizer) -> None:
    generator = random.Random(22)
    for _ in range(300):
        ids = random_ids(generator, sentencepiece.get_vocab_size())
        _, whole = stream_all(sentencepiece, ids)
        expected = sentencepiece.decode(ids)
        assert [c for c in whole if c in "hlorw"] == [c for c in expected if c in "hlorw"] or REPLACEMENT in expected


def test_an_unfinished_character_is_held_back_until_it_is_whole(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode("€x", add_special_tokens=False).ids
    stream = TextStream(byte_level.decode)
    texts = [stream.push(token_id) for token_id in ids]
    assert texts[-2:] == ["€", "x"]
    assert set(texts[:-2]) == {""}


def test_letters_before_an_unfinished_character_in_one_token_come_at_once(byte_level: RawTokenizer) -> None:
    stream = TextStream(byte_level.decode)
    assert stream.push(byte_level.token_to_id("aâ")) == "a"
    assert stream.push(byte_level.token_to_id("Ĥ¬")) == "€"


def test_a_real_replacement_character_comes_out_with_the_next_token(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode(f"{REPLACEMENT}x", add_special_tokens=False).ids
    deltas, _ = stream_all(byte_level, ids)
    assert deltas == ["", "", "", f"{REPLACEMENT}x", ""]


def test_invalid_bytes_come_out_while_they_come(byte_level: RawTokenizer) -> None:
    invalid = byte_level.token_to_id("ÿ")
    deltas, whole = stream_all(byte_level, [invalid] * 200)
    assert whole == REPLACEMENT * 200
    assert "".join(deltas[:100]).count(REPLACEMENT) >= 95


@pytest.mark.parametrize("token", ["hell", "Ġ", "ÿ", "ðŁ", "</s>", "<think>"])
def test_the_work_for_a_token_does_not_grow_with_the_text(byte_level: RawTokenizer, token: str) -> None:
    decoded_tokens: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded_tokens.append(len(ids))
        return str(byte_level.decode(ids))

    detokenizer = Detokenizer(decode)
    for _ in range(300):
        detokenizer.push(byte_level.token_to_id(token))
    assert max(decoded_tokens) <= MAXIMUM_WINDOW_TOKENS + 1
    assert len(decoded_tokens) <= 2 * 300


def test_the_spaces_of_a_sentencepiece_text_do_not_widen_the_window(sentencepiece: RawTokenizer) -> None:
    widest = 0

    def decode(ids: list[int]) -> str:
        nonlocal widest
        widest = max(widest, len(ids))
        return str(sentencepiece.decode(ids))

    detokenizer = Detokenizer(decode)
    space = sentencepiece.token_to_id("▁")
    text = "".join(detokenizer.push(space) for _ in range(200)) + detokenizer.finish()
    assert text == " " * 199
    assert widest <= MAXIMUM_WINDOW_TOKENS + 1


def test_an_answer_that_continues_a_text_keeps_its_first_space(sentencepiece: RawTokenizer) -> None:
    prompt = sentencepiece.encode("hello", add_special_tokens=True).ids
    answer = sentencepiece.encode("world", add_special_tokens=False).ids
    assert stream_all(sentencepiece, answer)[1] == "world"
    assert stream_all(sentencepiece, answer, context_ids=prompt)[1] == " world"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_prompt_and_its_continuation_are_the_text_wherever_it_is_cut(
    cut: int, kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: RawTokenizer = request.getfixturevalue(kind)
    text = "hell€ 你 world"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    _, continuation = stream_all(tokenizer, ids[cut:], context_ids=ids[:cut])
    assert tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT) + continuation == text


def test_special_tokens_are_text_only_when_asked_for(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode("he</s>llo<think>", add_special_tokens=False).ids
    assert stream_all(byte_level, ids)[1] == "hello<think>"
    assert stream_all(byte_level, ids, skip_special_tokens=False)[1] == "he</s>llo<think>"


def cut_by_definition(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first complete stop string, the longest of several that end there."""
    for end in range(1, len(text) + 1):
        lengths = [len(one) for one in stop if text[:end].endswith(one)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def test_stop_strings_cut_at_the_same_place_for_any_split_of_the_text() -> None:
    generator = random.Random(23)
    for _ in range(3000):
        stop = tuple(
            "".join(generator.choices("ab", k=generator.randrange(1, 6))) for _ in range(generator.randrange(1, 4))
        )
        text = "".join(generator.choices("abc", k=generator.randrange(0, 30)))
        expected, expected_found = cut_by_definition(text, stop)
        cutter, released, rest = StopStrings(stop), "", text
        while rest and not cutter.found:
            size = generator.randrange(1, 5)
            released += cutter.push(rest[:size])
            rest = rest[size:]
            assert expected.startswith(released)
        if not cutter.found:
            released += cutter.finish()
        assert (released, cutter.found) == (expected, expected_found), (text, stop)


def test_only_text_that_could_begin_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(("END", "\n\n"))
    assert cutter.push("text E") == "text "
    assert cutter.push("N") == ""
    assert cutter.push("T\n") == "ENT"
    assert cutter.push("x") == "\nx"


def test_a_half_stop_string_is_held_back_and_comes_at_the_end(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode("hello wor", add_special_tokens=False).ids
    deltas, whole = stream_all(byte_level, ids, stop=("world",))
    assert whole == "hello wor"
    assert deltas[-1] == "wor"


def test_a_stop_string_in_the_middle_of_a_token_ends_the_text(byte_level: RawTokenizer) -> None:
    stream = TextStream(byte_level.decode, stop=("el",))
    assert (stream.push(byte_level.token_to_id("a")), stream.finished) == ("a", False)
    assert (stream.push(byte_level.token_to_id("hell")), stream.finished) == ("h", True)
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="after the stop string"):
        stream.push(1)


def test_a_stop_string_across_characters_and_tokens_is_found(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode("price: 5€ 😀 end", add_special_tokens=False).ids
    deltas, whole = stream_all(byte_level, ids, stop=("€ 😀",))
    assert whole == "price: 5"
    assert len(deltas) < len(ids)


def test_a_replacement_character_can_be_a_stop_string(byte_level: RawTokenizer) -> None:
    ids = byte_level.encode("a", add_special_tokens=False).ids
    stream = TextStream(byte_level.decode, (REPLACEMENT,))
    assert stream.push(ids[0]) == "a"
    assert stream.push(byte_level.token_to_id("ÿ")) == ""
    assert (stream.finish(), stream.finished) == ("", True)


@pytest.mark.model
def test_any_ids_of_the_real_model_give_the_decoded_whole() -> None:
    tokenizer = Tokenizer(real_model_folder())
    generator = random.Random(24)
    for _ in range(300):
        ids = random_ids(generator, tokenizer.vocabulary_size)
        assert stream_all(tokenizer, ids)[1] == tokenizer.decode(ids)


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_the_real_models_tokens_comes_out_as_it_went_in(text: str) -> None:
    tokenizer = Tokenizer(real_model_folder())
    ids = tokenizer.encode(text, add_special_tokens=False, context_length=8192)
    assert stream_all(tokenizer, ids)[1] == text
