"""Splits of text by the names of GGUF files, against transformers and the published forms."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from services.coordinator.text.vocabulary.pre_tokenizers import PRE_TOKENIZERS

TEXT = (
    "Hello  world's WE'LL 12345 x\u00b2 \u00bd\n\n\t{}() -- caf\u00e9 e\u0301 \u4f60\u597d\u4e16\u754c \u3072\u3089 "
    "\u041c\u043e\u0441\u043a\u0432\u0430\u0413\u043e\u0440\u043e\u0434 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "CamelCASEWord/path \r\n  end  "
)


def split(name: str, text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


def test_transformers_splits_the_same() -> None:
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    assert len(theirs) > 20
    for name, pattern in theirs.items():
        expected = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(TEXT)
        assert split(name, TEXT) == [piece for piece, _ in expected], name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_character_is_lost(name: str) -> None:
    assert "".join(split(name, TEXT)) == TEXT


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "in 2024's", ["in", " 2024", "'s"]),
        ("gpt-2", "a   2", ["a", "  ", " 2"]),
        ("smollm", "in 2024", ["in", " ", "2", "0", "2", "4"]),
        ("smollm", "a   2", ["a", "   ", "2"]),
        ("llama-bpe", "in 2024'S", ["in", " ", "202", "4", "'S"]),
        ("qwen2", "in 2024'S", ["in", " ", "2", "0", "2", "4", "'S"]),
        ("falcon", "is 12345!", ["is", " ", "123", "45", "!"]),
        ("deepseek-v3", "x=1234", ["x", "=", "123", "4"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("afmoe", "no 1234567", ["no", " ", "1", "234", "567"]),
        ("superbpe", "1234567", ["1", "234", "567"]),
        ("kimi-k2", "a\u4f60\u597db", ["a", "\u4f60\u597d", "b"]),
        ("gpt-4o", "\u0939\u093f\u0928\u094d\u0926\u0940 it's", ["\u0939\u093f\u0928\u094d\u0926\u0940", " it's"]),
        ("tekken", "HTTPServer 12", ["HTTPServer", " ", "1", "2"]),
        ("laguna", "a\n b", ["a", "\n", " b"]),
    ],
)
def test_text_is_split_as_the_family_was_trained(name: str, text: str, expected: list[str]) -> None:
    assert split(name, text) == expected
