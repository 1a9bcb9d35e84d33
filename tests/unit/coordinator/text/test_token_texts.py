import pytest

from services.coordinator.text.detokenizer import text_offsets
from services.coordinator.text.token_texts import TokenBytes, TokenTexts
from tests.support.models.made_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

TEXTS = ["hello  world", "é 😀 €", "a\nb\t", "<|user|>hell"]


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(make, text):
    tokenizer = make()
    texts = TokenTexts(TokenBytes(tokenizer).of)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(texts.bytes_of, ids)).decode().removeprefix(" ") == text


def test_a_token_that_is_a_part_of_a_character_is_named_by_its_bytes():
    tokenizer = byte_level_tokenizer()
    texts = TokenTexts(TokenBytes(tokenizer).of)
    names = [texts.name_of(token_id) for token_id in tokenizer.encode("😀").ids]
    assert names == ["bytes:\\xf0\\x9f\\x98", "bytes:\\x80"]
    assert texts.text_of(tokenizer.encode("😀").ids[1]) == "\ufffd"


def test_special_tokens_are_named_by_their_text_and_unknown_ids_by_their_number():
    tokenizer = byte_level_tokenizer()
    texts = TokenTexts(TokenBytes(tokenizer).of)
    assert texts.name_of(tokenizer.token_to_id("<s>")) == "<s>"
    assert texts.name_of(tokenizer.token_to_id("<think>")) == "<think>"
    assert texts.name_of(99_999) == "token_id:99999"
    assert texts.bytes_of(99_999) == b""


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_offsets_point_to_each_tokens_place(make):
    tokenizer = make()
    texts = TokenTexts(TokenBytes(tokenizer).of)
    ids = tokenizer.encode("hello é world", add_special_tokens=False).ids
    text, offsets = text_offsets(lambda part: tokenizer.decode(part, skip_special_tokens=False), ids)
    assert text == "hello é world"
    assert offsets == sorted(offsets)
    for place, token_id in enumerate(ids):
        name = texts.name_of(token_id)
        if place and not name.startswith("bytes:"):
            assert text.startswith(name, offsets[place])
