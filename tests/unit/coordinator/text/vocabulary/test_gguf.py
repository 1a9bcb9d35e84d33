"""Vocabularies of made GGUF files: defaults as llama.cpp's loader has them, kinds of tokens, refusals."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from noodle.errors import UnsupportedModel
from services.coordinator.text.detokenizer import text_offsets
from services.coordinator.text.vocabulary.gguf import GgufVocabulary, read_chat_templates
from tests.support.models.gguf_vocabularies import made_file, tokenizer_metadata, vocabulary_of
from tests.support.models.tiny_gguf import MERGES, TOKENS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(TOKENS) - 3),
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"\u2581abhi",
    "hi",
    "\u2581hi",
    "  ",
    "[gone]",
]
SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "tokens": PIECES,
    "scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) - 259)],
    "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 7 + [USER_DEFINED, UNUSED],
}


def byte_level(*more: str, kind: int = NORMAL, **changes: Any) -> GgufVocabulary:
    """A byte-level vocabulary with further tokens of a kind."""
    tokens, types = [*TOKENS, *more], [*BYTE_LEVEL["token_type"], *[kind] * len(more)]
    return vocabulary_of(**{**BYTE_LEVEL, "tokens": tokens, "token_type": types, **changes})


def sentencepiece(**changes: Any) -> GgufVocabulary:
    return vocabulary_of(**{**SENTENCEPIECE, **changes})


def tokens_of(vocabulary: GgufVocabulary, text: str, add_special_tokens: bool = False) -> list[str | None]:
    return [vocabulary.token_of(token_id) for token_id in vocabulary.encode(text, add_special_tokens)]


def test_every_byte_of_a_text_comes_back() -> None:
    text = "  the 12 th\u00e9\u00e2tre\t<x> \u65e5\u672c \U0001f600\n\n"
    for vocabulary in (byte_level(), sentencepiece()):
        assert vocabulary.decode(vocabulary.encode(text, add_special_tokens=True), skip_special_tokens=True) == text


def test_merges_are_applied_in_their_order() -> None:
    assert tokens_of(byte_level(), "a the") == ["a", "\u0120the"]
    assert tokens_of(sentencepiece(), "hi hi") == ["\u2581hi", "\u2581hi"]


def test_added_tokens_stay_whole_and_only_control_tokens_are_left_out_of_an_answer() -> None:
    vocabulary = byte_level()
    text = "<|start|>a<think>b<|end|>"
    ids = vocabulary.encode(text, add_special_tokens=False)
    assert (ids[0], ids[2], ids[4]) == (1, 2, 0)
    assert vocabulary.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert vocabulary.decode(ids, skip_special_tokens=False) == text
    assert vocabulary.special_ids == {0, 1}


def test_every_part_of_a_text_after_a_special_token_begins_with_a_space_as_the_text_does() -> None:
    assert tokens_of(sentencepiece(), "hi<s>hi") == ["\u2581hi", "<s>", "\u2581hi"]
    assert tokens_of(sentencepiece(), " hi") == ["\u2581", "\u2581hi"]
    assert tokens_of(sentencepiece(add_space_prefix=False), "hi<s>hi") == ["hi", "<s>", "hi"]


def test_unused_tokens_and_ids_outside_the_vocabulary_have_no_text() -> None:
    vocabulary = sentencepiece()
    assert vocabulary.decode([-1, PIECES.index("[gone]"), 10**9, PIECES.index("a")], skip_special_tokens=True) == "a"
    assert vocabulary.token_of(-1) is None
    assert vocabulary.token_of(len(PIECES)) is None


def test_a_byte_token_is_a_byte() -> None:
    ids = [PIECES.index("<0xC3>"), PIECES.index("<0xA9>"), PIECES.index("<0xFF>")]
    assert sentencepiece().decode(ids, skip_special_tokens=True) == "\u00e9\ufffd"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("seed", range(20))
def test_an_answer_in_pieces_is_the_answer_as_a_whole(make: Callable[[], GgufVocabulary], seed: int) -> None:
    vocabulary, draw = make(), random.Random(seed)
    ids = [draw.randrange(vocabulary.size) for _ in range(60)]  # many are parts of characters, or none
    whole = vocabulary.decode(ids, skip_special_tokens=True)
    assert text_offsets(lambda part: vocabulary.decode(part, skip_special_tokens=True), ids)[0] == whole


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, ["<|start|>"]),
        ({"pre": "llama-bpe"}, ["<|start|>"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
        ({"pre": "llama-bpe", "bos_token_id": None}, []),
        ({"pre": "tekken", "add_eos_token": True}, ["<|start|>", "<|end|>"]),
        ({"model": "gemma4", "add_bos_token": False}, ["<|start|>"]),
    ],
)
def test_the_loader_decides_which_tokens_are_added(changes: dict[str, Any], expected: list[str]) -> None:
    assert tokens_of(byte_level(**changes), "", add_special_tokens=True) == expected


def test_a_sentencepiece_file_without_keys_has_the_ids_of_llama() -> None:
    vocabulary = sentencepiece()
    assert tokens_of(vocabulary, "", add_special_tokens=True) == ["<s>"]
    assert vocabulary.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert vocabulary.end_ids == {2}
    assert tokens_of(sentencepiece(add_bos_token=False), "", add_special_tokens=True) == []


def test_a_file_without_kinds_has_its_named_tokens_and_bytes() -> None:
    vocabulary = sentencepiece(token_type=None)
    assert tokens_of(vocabulary, "<s>\u00e9") == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    assert vocabulary.special_ids == {0, 1, 2}


def test_tokens_that_end_a_turn_end_an_answer_whatever_the_file_says() -> None:
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>")
    vocabulary = byte_level(*names)
    assert {vocabulary.token_of(token_id) for token_id in vocabulary.end_ids} == {"<|end|>", *names}
    assert vocabulary.end_ids <= vocabulary.special_ids
    assert tokens_of(vocabulary, "a<|im_end|>") == ["a", "<|im_end|>"]


def test_the_tag_of_html_ends_no_answer() -> None:
    assert byte_level("</s>").end_ids == {0}
    assert byte_level("</s>", kind=CONTROL).end_ids == {0, len(TOKENS)}


def test_the_end_of_a_message_within_an_answer_does_not_end_it() -> None:
    vocabulary = byte_level(
        "<|return|>", "<|call|>", "<|channel|>", "<|message|>", kind=CONTROL, eos_token_id=len(TOKENS)
    )
    assert {vocabulary.token_of(token_id) for token_id in vocabulary.end_ids} == {"<|return|>", "<|call|>"}
    ids = vocabulary.encode("<|start|>a<|channel|>b<|end|>", add_special_tokens=False)
    assert vocabulary.decode(ids, skip_special_tokens=True) == "<|start|>a<|channel|>b<|end|>"


def test_phi_3_swallows_white_space_after_its_special_tokens() -> None:
    metadata = {**tokenizer_metadata(**BYTE_LEVEL), "general.name": "Phi-3 mini"}
    vocabulary = GgufVocabulary(made_file(metadata))
    assert tokens_of(vocabulary, "<|start|>\n a") == ["<|start|>", "a"]


def test_a_file_that_does_not_name_its_pre_tokenizer_has_llama_cpps_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        vocabulary = byte_level(pre=None)
    assert "tokenizer.ggml.pre" in caplog.text
    assert len(vocabulary.encode("1234", add_special_tokens=False)) == 4


def test_merges_of_tokens_that_are_missing_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        vocabulary = byte_level(merges=[*MERGES, "a b", "\u0120 t"])
    assert "1 of 5 merges" in caplog.text
    assert tokens_of(vocabulary, "a the") == ["a", "\u0120the"]


def test_an_empty_token_does_not_shift_the_others() -> None:
    assert byte_level("", "xx").token_of(len(TOKENS)) == f"[EMPTY_{len(TOKENS)}]"


def test_chat_templates_have_the_names_of_their_keys() -> None:
    metadata = {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
    }
    assert read_chat_templates(made_file(metadata)) == {"default": "a", "tool_use": "b"}
    assert read_chat_templates(made_file({})) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"model": "rwkv"}, "'rwkv'. is of RWKV models"),
        ({"model": "word2vec"}, "'word2vec'. is not known; known are gpt2, llama, gemma4"),
        ({"pre": "gpt2"}, "pre = 'gpt2' is not known; the nearest known name is 'gpt-2'"),
        ({"pre": [1]}, r"pre = '\[1\]' is not known"),
        ({"tokens": None}, r"holds no tokenizer .tokenizer\.ggml\.tokens is missing"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens is empty"),
        ({"tokens": [1] * len(TOKENS)}, "is not a list of texts"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "1 of the .* are there twice, the first is 'a' with the ids 67 and 262"),
        ({"tokens": [*TOKENS[:-1], "\udcff"]}, r"token 262 of .* is not UTF-8: b'\\xff'"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 items for 263 tokens"),
        ({"token_type": ["a"] * len(TOKENS)}, "token_type is not a list of numbers"),
        ({"token_type": [BYTE] * len(TOKENS)}, "token 0 is '<|end|>', but .* says that it is a byte"),
        ({"scores": [0.0] * 5}, r"tokenizer\.ggml\.scores has 5 items"),
        ({"merges": None}, r"no merges .tokenizer\.ggml\.merges is missing"),
        ({"merges": ["a b", "he"]}, "merge 1 of .* is not two tokens: 'he'"),
        ({"merges": [7]}, "merges is not a list of texts"),
        ({"bos_token_id": 100_000}, r"tokenizer\.ggml\.bos_token_id is 100000, but the tokens have the ids 0 to 262"),
        ({"eos_token_id": -1}, r"eos_token_id is -1"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes', not true or false"),
        ({"model": "llama"}, r"no scores .tokenizer\.ggml\.scores is missing"),
        ({"model": "llama", "scores": [float("nan")] * len(TOKENS)}, "scores is not a list of numbers"),
    ],
)
def test_a_tokenizer_that_would_give_other_tokens_is_refused_with_file_and_key(
    changes: dict[str, Any], message: str
) -> None:
    message = message.replace("|", r"\|")
    with pytest.raises(UnsupportedModel, match=rf"made\.gguf: .*{message}") as caught:
        vocabulary_of(**{**BYTE_LEVEL, **changes})
    assert caught.value.cure


@pytest.mark.parametrize("rows", [len(TOKENS) - 1, len(TOKENS) + 1])
def test_tokens_that_do_not_fit_the_embedding_are_refused(rows: int) -> None:
    file = made_file(tokenizer_metadata(**BYTE_LEVEL), embedding_rows=rows)
    with pytest.raises(UnsupportedModel, match=rf"has 263 tokens, but token_embd\.weight has {rows} rows"):
        GgufVocabulary(file)
