"""The same ids, texts and prompts as transformers returns for the same folder, and refusals with their cure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE

from noodle.errors import ContextTooLong, InvalidRequest, ModelNotFound, UnsupportedModel
from services.coordinator.text.tokenizer import Tokenizer
from tests.support.models.made_tokenizers import (
    CHAT_TEMPLATE,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer_folder,
)
from tests.support.models.real_model import real_model_folder
from tests.support.models.tiny_gguf import TOKENS, TinyLlama, write_tiny_gguf

CONTEXT = 8192
TEXTS = [
    "hello world",
    " leading and trailing ",
    "naïve café, 你好, 👩‍👩‍👧‍👦 €€€",
    "def f(x):\n\treturn x ** 2  # 12345\n\n\n",
    "<s>special</s> <|user|> <think> <|im_end|>text",
    "",
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": 'Hi <b> & "you" it\'s {{ 7 * 7 }} 你好'}],
    [{"role": "system", "content": " short "}, {"role": "user", "content": "a\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": ""},
    ],
]


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_like_transformers(folder: Path) -> None:
    ours, reference = Tokenizer(folder), theirs(folder)
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = ours.encode(text, add_special_tokens, CONTEXT)
            assert ids == reference.encode(text, add_special_tokens=add_special_tokens), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert {token_id for token_id in range(ours.vocabulary_size) if ours.is_special(token_id)} == {
        token_id for token_id, token in reference.added_tokens_decoder.items() if token.special
    }
    assert reference.eos_token_id in ours.eos_token_ids
    assert ours.has_chat_template is bool(reference.chat_template)
    if not reference.chat_template:
        return
    for messages in CONVERSATIONS:
        for add_generation_prompt in (True, False):
            prompt = ours.apply_chat_template(messages, add_generation_prompt)
            assert prompt == reference.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            assert (
                ours.encode(prompt, False, CONTEXT)
                == reference.apply_chat_template(
                    messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
                )["input_ids"]
            )


@pytest.mark.model
def test_the_real_models_tokenizer_matches_transformers() -> None:
    assert_like_transformers(real_model_folder())


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False}},
        {"eos_token": "he"},  # a word of the vocabulary becomes special by being named
        {"unk_token": None, "pad_token": "</s>"},
    ],
    ids=str,
)
def test_a_made_tokenizer_matches_transformers(tmp_path: Path, make: Any, settings: dict[str, Any]) -> None:
    if settings.get("eos_token") == "he" and make is sentencepiece_tokenizer:
        settings = {"eos_token": "▁he"}
    assert_like_transformers(write_tokenizer_folder(tmp_path, make(), chat_template=CHAT_TEMPLATE, **settings))


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}], ids=str)
def test_a_llama_tokenizer_of_any_age_matches_transformers(
    tmp_path: Path, tokenizer_class: str, settings: dict[str, Any]
) -> None:
    settings = {"tokenizer_class": tokenizer_class, "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE, **settings}
    assert_like_transformers(write_tokenizer_folder(tmp_path / "sentencepiece", sentencepiece_tokenizer(), **settings))
    settings["unk_token"] = None
    assert_like_transformers(write_tokenizer_folder(tmp_path / "byte_level", byte_level_tokenizer(), **settings))


def test_tokens_that_only_tokenizer_config_lists_are_added(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    listed = {str(token_id): _flags(token) for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    listed[str(size)] = {
        "content": "<|im_end|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    folder = write_tokenizer_folder(tmp_path, tokenizer, added_tokens_decoder=listed, eos_token="<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + 1}))
    assert_like_transformers(folder)
    assert Tokenizer(folder).encode("<|im_end|>", False, CONTEXT) == [size]


def _flags(token: Any) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def test_truncation_and_padding_written_in_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=100)
    folder = write_tokenizer_folder(tmp_path, tokenizer)
    assert Tokenizer(folder).decode(Tokenizer(folder).encode("hello world", False, CONTEXT)) == "hello world"


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, place: str) -> None:
    settings: dict[str, Any] = {}
    if place == "config":
        settings["chat_template"] = CHAT_TEMPLATE
    elif place == "named":
        other = {"name": "rag", "template": "wrong"}
        settings["chat_template"] = [other, {"name": "default", "template": CHAT_TEMPLATE}]
    else:
        settings["chat_template"] = "wrong"
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer(), **settings)
    if place == "file":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ours, reference = Tokenizer(folder), theirs(folder)
    for messages in CONVERSATIONS:
        assert ours.apply_chat_template(messages) == reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def tokenizer_with(folder: Path, **settings: Any) -> Tokenizer:
    return Tokenizer(write_tokenizer_folder(folder, byte_level_tokenizer(), **settings))


def test_a_model_without_a_template_names_the_other_route(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        tokenizer_with(tmp_path).apply_chat_template(CONVERSATIONS[0])
    assert "/v1/completions" in caught.value.cure
    assert caught.value.param == "messages"


def test_a_template_that_drops_messages_is_named_when_the_model_is_opened(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, chat_template="{{ messages[-1].content }}")
    assert any("system" in note and str(tmp_path) in note for note in tokenizer.chat_notes)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    with pytest.raises(ContextTooLong) as caught:
        tokenizer.encode("x" * 5_000_000, False, 100)
    assert "5000000 characters" in caught.value.message
    assert "100 tokens" in caught.value.message
    longest = "<|assistant|>" * 100
    assert len(tokenizer.encode(longest, False, 100)) == 100


def test_the_fewest_tokens_of_texts_are_never_more_than_they_have(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    for texts in (["<|assistant|>" * 50], ["x" * 100, "", "yy"], [""]):
        fewest = tokenizer.fewest_tokens(texts)
        assert fewest <= len(tokenizer.encode("".join(texts), False, 10_000))
        assert fewest >= len("".join(texts)) // 20


def with_embeddings(folder: Path, count: int, **changes: Any) -> Path:
    """A folder of 265 tokens of text and six added ones, and a model with `count` embeddings."""
    write_tokenizer_folder(folder, byte_level_tokenizer(), **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": count}))
    return folder


def test_an_added_token_without_an_embedding_is_refused_when_it_comes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(with_embeddings(tmp_path, 268))
    with pytest.raises(InvalidRequest, match="no embedding"):
        tokenizer.encode("<|assistant|>", False, CONTEXT)


@pytest.mark.parametrize(
    ("count", "changes", "token"),
    [
        (200, {}, "the id 266"),
        (266, {}, "'</s>'"),  # the end of an answer
        (268, {"chat_template": CHAT_TEMPLATE}, "'<|assistant|>'"),  # of every chat
    ],
)
def test_a_tokenizer_of_another_model_stops_the_start_by_name_and_with_the_cure(
    tmp_path: Path, count: int, changes: dict[str, str], token: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        Tokenizer(with_embeddings(tmp_path, count, **changes))
    assert str(tmp_path / "tokenizer.json") in caught.value.message
    assert token in caught.value.message
    assert f"{count} embeddings" in caught.value.message
    assert "belong to the model" in caught.value.cure


@pytest.mark.parametrize(
    ("generation_config", "config_eos", "expected"),
    [
        ({"eos_token_id": 7}, 8, {7}),
        ({"eos_token_id": [7, 9]}, 8, {7, 9}),
        ({}, [8, 9], {8, 9}),
        ({"eos_token_id": None}, 8, {8}),
        (None, None, set()),
    ],
)
def test_the_ends_are_those_the_model_names_and_the_tokenizers_own(
    tmp_path: Path, generation_config: dict[str, Any] | None, config_eos: Any, expected: set[int]
) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": config_eos}))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    own = byte_level_tokenizer().token_to_id("</s>")
    assert Tokenizer(folder).eos_token_ids == {*expected, own}


def test_the_sizes_of_a_model_of_several_parts_stand_in_its_text_config(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 999, "eos_token_id": 5}}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocabulary_size == 999
    assert 5 in tokenizer.eos_token_ids


def test_without_a_config_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).vocabulary_size == byte_level_tokenizer().get_vocab_size(with_added_tokens=True)


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json") as caught:
        Tokenizer(tmp_path)
    assert "save_pretrained" in caught.value.cure


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": 1}', b"\xff\xfe"])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "part", [{"model": {"type": "Syllables", "vocab": {}}}, {"version": "2.0"}, {"pre_tokenizer": {"type": "Verses"}}]
)
def test_a_tokenizer_of_a_newer_library_is_told_from_a_broken_one(tmp_path: Path, part: dict[str, Any]) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **part}), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json .* tokenizers [\d.]+ does not know") as caught:
        Tokenizer(folder)
    assert "newer" in caught.value.cure


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ModelNotFound, match=name.replace(".", r"\.")) as caught:
        Tokenizer(folder)
    assert "git lfs pull" in caught.value.cure


def test_a_vocabulary_without_tokens_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, RawTokenizer(BPE()))
    with pytest.raises(ModelNotFound, match="holds no tokens"):
        Tokenizer(folder)


def test_ids_that_are_none_end_no_answer(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    own = byte_level_tokenizer().token_to_id("</s>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 1 << 40, True, 1.5]}))
    assert Tokenizer(folder).eos_token_ids == {own}


def test_keys_of_added_tokens_that_are_no_numbers_do_no_harm(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, added_tokens_decoder={"x": {"content": "<z>"}, "9" * 5000: {"content": "<y>"}})
    assert len(tokenizer.pieces("<z><y>", False)) == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_broken_companion_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level_tokenizer())
    (folder / name).write_bytes(content)
    with pytest.raises(ModelNotFound, match=name.replace(".", r"\.")):
        Tokenizer(folder)


def test_a_tokenizer_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, services.coordinator.text.tokenizer; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "False"


def test_a_gguf_file_has_its_tokenizer_in_its_metadata(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_gguf(tmp_path / "m\u00fcller model.gguf", TinyLlama(add_bos=True)))
    ids = tokenizer.encode("a the <think>\n\U0001f600", True, CONTEXT)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "a the <think>\n\U0001f600"
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.is_special(0)
    assert not tokenizer.is_special(2)
    assert tokenizer.vocabulary_size == len(TOKENS)
    assert tokenizer.texts.name_of(TOKENS.index("\u0120the")) == " the"
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(ContextTooLong):
        tokenizer.encode("a" * 1000, True, 10)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf"):
        Tokenizer(tmp_path / "none.gguf")
