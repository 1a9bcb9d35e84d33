import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from noodle.errors import UnsupportedModel
from services.coordinator.models.gguf_tokenizer import (
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    build_tokenizer,
    generation_ids,
    write_tokenizer,
)
from tests.support.models.tiny_gguf import MERGES, TOKENS


def metadata(**changes: Any) -> dict[str, Any]:
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    for name, value in changes.items():
        values[f"tokenizer.ggml.{name}"] = value
    return values


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_every_byte_of_a_text_comes_back() -> None:
    tokenizer = build_tokenizer(metadata())
    text = "  the 12 théâtre\t<x> 日本 😀\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_merges_are_applied() -> None:
    assert build_tokenizer(metadata()).encode("a the").tokens == ["a", "Ġthe"]


def test_added_tokens_stay_whole_and_only_control_tokens_are_special() -> None:
    tokenizer = build_tokenizer(metadata())
    ids = tokenizer.encode("<|start|>a<think>b<|end|>").ids
    assert (ids[0], ids[2], ids[4]) == (1, 2, 0)
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>a<think>b<|end|>"


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("smollm", "a   2", ["a", "ĠĠĠ", "2"]),
        ("gpt-2", "in 2024's", ["in", "Ġ2024", "'s"]),
        ("gpt-2", "a   2", ["a", "ĠĠ", "Ġ2"]),
        ("llama-bpe", "in 2024'S", ["in", "Ġ", "202", "4", "'S"]),
        ("qwen2", "in 2024'S", ["in", "Ġ", "2", "0", "2", "4", "'S"]),
    ],
)
def test_text_is_split_as_the_family_was_trained(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(build_tokenizer(metadata(pre=pre)), text) == expected


def test_the_expressions_are_transformers_own() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    assert mapping.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"] == LLAMA3_SPLIT
    assert mapping.GGUF_PRE_TOKENIZER_SPLITS["qwen2"] == QWEN2_SPLIT


def test_qwen2_composes_accents_before_it_cuts() -> None:
    tokenizer = build_tokenizer(metadata(pre="qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_a_beginning_token_is_put_in_front_if_the_file_asks_for_it() -> None:
    assert build_tokenizer(metadata(add_bos_token=True)).encode("a").ids[0] == 1
    assert build_tokenizer(metadata(add_bos_token=False)).encode("a").ids[0] != 1


def test_the_end_of_a_turn_ends_a_generation_too() -> None:
    assert generation_ids(metadata())["eos_token_id"] == 0
    assert generation_ids(metadata(eot_token_id=2))["eos_token_id"] == [0, 2]


def test_the_folder_has_what_transformers_reads(tmp_path: Path) -> None:
    write_tokenizer(metadata(), tmp_path, 128)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|start|>", "<|end|>")
    assert (config["chat_template"], config["model_max_length"]) == ("{{ messages }}", 128)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == len(TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"model": "llama"}, "of kind 'llama'"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "1 tokens twice"),
        ({"merges": None}, "no merges"),
        ({"merges": ["he"]}, "not two tokens"),
        ({"bos_token_id": 100_000}, "names token 100000"),
    ],
)
def test_a_tokenizer_that_would_give_other_tokens_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        write_tokenizer(metadata(**changes), tmp_path, 128)
