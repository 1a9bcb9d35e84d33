"""The vocabularies that llama.cpp publishes for its own tests give the ids that lie beside them."""

from __future__ import annotations

import pytest

from noodle.errors import UnsupportedModel
from services.coordinator.text.detokenizer import text_offsets
from services.coordinator.text.vocabulary.gguf import GgufVocabulary, read_chat_templates
from tests.support.models.gguf_vocabularies import expected_ids, read_published
from tests.support.models.llama_cpp_source import llama_cpp_models

WITH_IDS = (
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)
WITHOUT_IDS = ("aquila", "baichuan", "gpt-neox")
REFUSED = {
    "bert-bge": "WordPiece, which models that only embed",
    "nomic-bert-moe": "Unigram, which models with an encoder",
}
# BOS as llama.cpp's loader decides it: by the key, or else by the pre-tokenizer
FIRST_TOKENS = {
    "command-r": "<BOS_TOKEN>",
    "deepseek-coder": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "deepseek-llm": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "gemma-4": "<bos>",
    "llama-bpe": "<|begin_of_text|>",  # its file has no add_bos_token
    "llama-spm": "<s>",
    "baichuan": "<s>",  # nor has this
    "phi-3": "<s>",
}
END_TOKENS = {
    "llama-bpe": {"<|end_of_text|>", "<|eot_id|>"},
    "phi-3": {"<|endoftext|>", "<|end|>"},
    "qwen2": {"<|endoftext|>", "<|im_end|>"},
    "gemma-4": {"<eos>", "<turn|>", "<|tool_response>"},
}


def published(name: str) -> GgufVocabulary:
    return GgufVocabulary(read_published(llama_cpp_models() / f"ggml-vocab-{name}.gguf"))


@pytest.fixture(scope="module", params=[*WITH_IDS, *WITHOUT_IDS])
def named(request: pytest.FixtureRequest) -> tuple[str, GgufVocabulary]:
    """A vocabulary with its name; each is loaded once for all tests."""
    return request.param, published(request.param)


def test_every_text_has_the_expected_ids_and_comes_back(named: tuple[str, GgufVocabulary]) -> None:
    name, vocabulary = named
    source = name if name in WITH_IDS else "qwen35"
    for text, expected in expected_ids(llama_cpp_models() / f"ggml-vocab-{source}.gguf"):
        ids = vocabulary.encode(text, add_special_tokens=False)
        assert ids == expected or name in WITHOUT_IDS, text
        assert vocabulary.decode(ids, skip_special_tokens=True) == text
        streamed, _ = text_offsets(lambda part: vocabulary.decode(part, skip_special_tokens=True), ids)
        assert streamed == text


def test_every_token_has_its_place_in_the_text(named: tuple[str, GgufVocabulary]) -> None:
    _, vocabulary = named
    for text, _ in expected_ids(llama_cpp_models() / "ggml-vocab-qwen35.gguf"):
        pieces = vocabulary.pieces(text, add_special_tokens=False)
        assert [piece.token_id for piece in pieces] == vocabulary.encode(text, add_special_tokens=False)
        end = 0
        for piece in pieces:  # each begins where the one before ended, or is a part of the same character
            assert piece.start == end or piece.stop == end, (text, pieces)
            end = max(end, piece.stop)
        assert end == len(text)


def test_a_text_begins_with_the_token_that_the_loader_decides(named: tuple[str, GgufVocabulary]) -> None:
    name, vocabulary = named
    first = [vocabulary.token_of(token_id) for token_id in vocabulary.encode("", add_special_tokens=True)]
    assert first == ([FIRST_TOKENS[name]] if name in FIRST_TOKENS else [])


def test_an_answer_ends_with_the_tokens_that_end_a_turn(named: tuple[str, GgufVocabulary]) -> None:
    name, vocabulary = named
    ends = {vocabulary.token_of(token_id) for token_id in vocabulary.end_ids}
    assert ends == END_TOKENS[name] if name in END_TOKENS else ends


@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_no_model_uses_to_write_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        published(name)


def test_named_chat_templates_are_found_beside_the_default_one() -> None:
    templates = read_chat_templates(read_published(llama_cpp_models() / "ggml-vocab-command-r.gguf"))
    assert set(templates) == {"default", "rag", "tool_use"}
