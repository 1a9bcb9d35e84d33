"""The vocabulary of a model's folder: the files that transformers reads, with the same ids; tests compare them.

They are tokenizer.json, tokenizer_config.json and their older forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.pre_tokenizers import Metaspace

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.gguf import LFS_MAGIC
from services.coordinator.text.token_texts import TokenBytes
from services.coordinator.text.vocabulary.base import Piece

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_TOKENIZER_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
MAXIMUM_ID = 1 << 31
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class FolderVocabulary:
    """Threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises ModelNotFound if a file is missing or broken, UnsupportedModel if it is another model's."""
        self._folder = folder
        self._tokenizer = _load(folder / "tokenizer.json")
        self.settings = _read_settings(folder)
        config = read_json(folder / "config.json")
        _cut_like_llama(self._tokenizer, self.settings, config)
        self.special_tokens = _named_tokens(self.settings)
        _add_tokens(self._tokenizer, self.settings, self.special_tokens)
        # a prompt that is too long is refused, never cut
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ModelNotFound(f"{folder / 'tokenizer.json'} holds no tokens.", cure="Download the model again.")
        self.longest_token = max(map(len, vocabulary))
        self.size = _vocabulary_size(config) or max(vocabulary.values()) + 1
        self.end_ids = self._read_eos_ids(folder, config)
        self._bytes = TokenBytes(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def pieces(self, text: str, add_special_tokens: bool) -> list[Piece]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [Piece(token_id, *place) for token_id, place in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_of(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes.of(token_id)

    def refuse_foreign_tokenizer(self, chat: str) -> None:
        """Raise UnsupportedModel if ordinary text, a chat or an answer's end has ids outside the model's embedding.

        Other added tokens are left to the prompts that hold them: some models have one that they never use (small
        gemma 3 models have one for images).
        """
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        ids |= {token: token_id for token, token_id in self._ids_always_used(chat) if token}
        token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
        if largest >= self.size:
            raise UnsupportedModel(
                f"{self._folder / 'tokenizer.json'} is not this model's: its token {token!r} has the id {largest}, but "
                f"the model has {self.size} embeddings (vocab_size in config.json).",
                cure="Put the tokenizer files that belong to the model into its folder, or fetch the model again.",
            )

    def _ids_always_used(self, chat: str) -> Iterator[tuple[str, int]]:
        """Yield the tokens that begin prompts and chats, those around a message, and one that ends an answer."""
        encodings = [self._tokenizer.encode("a", add_special_tokens=True)]
        encodings.append(self._tokenizer.encode(chat, add_special_tokens=False))
        for encoding in encodings:
            yield from zip(encoding.tokens, encoding.ids, strict=True)
        if self.end_ids:
            first = min(self.end_ids)  # one that the model can sample is enough
            yield self._tokenizer.id_to_token(first) or "the end of text", first

    def _read_eos_ids(self, folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
        """Return the end tokens of generation_config.json, or else config.json, and the tokenizer's own."""
        named = _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        if not named:
            named = _ids(config.get("eos_token_id")) or _ids(_text_config(config).get("eos_token_id"))
        own = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return frozenset(named if own is None else [*named, own])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if the file is missing. Raises ModelNotFound for a broken file."""
    content = b""
    try:
        content = path.read_bytes()
        return msgspec.json.decode(content, type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelNotFound(f"{path} cannot be read: {error}.", cure=_cure_of(content)) from error


def _cure_of(content: bytes) -> str:
    if content.startswith(LFS_MAGIC):
        return "It is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder."
    return "Download the model again."


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelNotFound(
            f"{path} cannot be read: {error.strerror}.",
            cure="The folder needs a tokenizer.json; transformers writes one with save_pretrained().",
        ) from error
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        if _is_of_the_library(content):
            raise UnsupportedModel(
                f"{path} holds something that tokenizers {tokenizers.__version__} does not know: {error}.",
                cure="A newer library may have written it: update noodle, or use a GGUF file of this model.",
            ) from error
        raise ModelNotFound(f"{path} is not a tokenizer: {error}.", cure=_cure_of(content)) from error


def _is_of_the_library(content: bytes) -> bool:
    """Whether a file has the form of a tokenizer.json, of whatever version."""
    try:
        parsed = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("model"), dict)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, and the older special_tokens_map.json if the first lists no added tokens."""
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return {**settings, **read_json(folder / "special_tokens_map.json")}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token, ... as texts; a setting is the text or an object around it."""
    named: dict[str, str] = {}
    for name in NAMED_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the tokens that tokenizer_config.json lists beyond tokenizer.json, and mark the named ones as special.

    A named token that is in no vocabulary is not added: its id would be outside the model's embedding.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = settings.get("added_tokens_decoder")
    entries = sorted(listed.items(), key=lambda item: (len(item[0]), item[0])) if isinstance(listed, dict) else []
    for _, entry in entries:  # in the order of their ids
        content = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(content, str) and content not in known:
            flags = {name: bool(entry[name]) for name in ADDED_TOKEN_FLAGS if name in entry}
            tokenizer.add_tokens([AddedToken(content, **flags)])
            known.add(content)
    for text in named.values():
        if text not in known and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            known.add(text)


def _cut_like_llama(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Put ▁ before the text's first word only, not before each word after a special token, as transformers 5 does.

    The tokenizer.json of sentencepiece llamas has the older rule, which `legacy` in tokenizer_config.json asks for.
    """
    of_llama = config.get("model_type") == "llama" and settings.get("tokenizer_class") in LLAMA_TOKENIZER_CLASSES
    if not of_llama or not getattr(tokenizer.model, "byte_fallback", False):
        return
    prefix = settings.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if settings.get("legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if prefix is False else [*steps, decoders.Strip(content=" ", left=1)])


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _vocabulary_size(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size", _text_config(config).get("vocab_size"))
    return size if isinstance(size, int) and size > 0 else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < MAXIMUM_ID]
