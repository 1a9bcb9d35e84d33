"""A model's tokenizer: text to token ids and back, and prompts of conversations.

It reads the files that transformers reads (tokenizer.json, tokenizer_config.json, chat_template.jinja and their older
forms) and returns the same ids and prompts; tests compare them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.pre_tokenizers import Metaspace

from noodle.errors import ContextTooLong, InvalidRequest, ModelNotFound, UnsupportedModel
from services.coordinator.text.chat_template import ChatTemplate, read_chat_template
from services.coordinator.text.token_texts import TokenTexts

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_TOKENIZER_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MINIMUM_LONGEST_TOKEN = 16  # characters; so that a vocabulary of single bytes still accepts ordinary texts


@dataclass(frozen=True, slots=True)
class Piece:
    """A token and its characters [start, stop) in the text; empty for a special token that was added."""

    token_id: int
    start: int
    stop: int


class Tokenizer:
    """One model's tokenizer; threads may share it.

    `eos_token_ids` end an answer. `vocabulary_size` is the number of rows of the model's embedding, above every id of
    a prompt.
    """

    def __init__(self, folder: Path) -> None:
        """Load it. Raises ModelNotFound if a file is missing or broken, UnsupportedModel if it is another model's."""
        self._tokenizer = _load(folder / "tokenizer.json")
        settings = _read_settings(folder)
        config = read_json(folder / "config.json")
        _cut_like_llama(self._tokenizer, settings, config)
        self._special_tokens = _named_tokens(settings)
        _add_tokens(self._tokenizer, settings, self._special_tokens)
        # a prompt that is too long is refused, never cut
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token = max(MINIMUM_LONGEST_TOKEN, max(map(len, vocabulary), default=0))
        self.vocabulary_size = _vocabulary_size(config) or max(vocabulary.values(), default=-1) + 1
        self.eos_token_ids = self._read_eos_ids(folder, config)
        self.texts = TokenTexts(self._tokenizer)
        self._chat_template: ChatTemplate | None = read_chat_template(folder, settings)
        self._refuse_foreign_tokenizer(folder)

    def encode(self, text: str, add_special_tokens: bool, context_length: int) -> list[int]:
        """Return the token ids of a text, with the model's BOS and EOS if asked for; a chat's prompt has its own.

        Raises ContextTooLong before tokenizing if the text cannot fit into `context_length` tokens, even if each were
        the vocabulary's longest, and InvalidRequest for a token that the model has no embedding for.
        """
        maximum_characters = context_length * self._longest_token
        if len(text) > maximum_characters:
            raise ContextTooLong(
                f"The prompt has {len(text)} characters, but this model's context of {context_length} tokens "
                f"holds at most {maximum_characters}.",
                cure="Shorten the prompt.",
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if ids and max(ids) >= self.vocabulary_size:
            token = self._tokenizer.id_to_token(max(ids))
            raise InvalidRequest(f"The prompt holds {token!r}, for which this model has no embedding.")
        return ids

    def fewest_tokens(self, texts: Iterable[str]) -> int:
        """Return the least number of tokens of some texts: as if each were the vocabulary's longest."""
        return -(-sum(map(len, texts)) // self._longest_token)

    def pieces(self, text: str, add_special_tokens: bool) -> list[Piece]:
        """Return the tokens of a text of any length, each with its place in it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [Piece(token_id, *place) for token_id, place in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Ids outside the vocabulary have none; invalid UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, to be encoded without adding special tokens.

        Raises InvalidRequest if the model has no template, or the template refuses these messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot answer messages.",
                cure="Send the whole prompt to /v1/completions.",
                param="messages",
            )
        return self._chat_template.render(messages, self._special_tokens, add_generation_prompt)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _refuse_foreign_tokenizer(self, folder: Path) -> None:
        """Raise UnsupportedModel if ordinary text, a chat or an answer's end has ids outside the model's embedding.

        Other added tokens are left to `encode`: some models have one that they never use (small gemma 3 models have one
        for images).
        """
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        ids |= {token: token_id for token, token_id in self._ids_always_used() if token}
        token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
        if largest >= self.vocabulary_size:
            raise UnsupportedModel(
                f"{folder / 'tokenizer.json'} is not this model's: its token {token!r} has the id {largest}, but the "
                f"model has {self.vocabulary_size} embeddings (vocab_size in config.json).",
                cure="Put the tokenizer files that belong to the model into its folder, or fetch the model again.",
            )

    def _ids_always_used(self) -> Iterator[tuple[str, int]]:
        """Yield the tokens that begin prompts and chats, those around a message, and one that ends an answer."""
        encodings = [self._tokenizer.encode("a", add_special_tokens=True)]
        with contextlib.suppress(InvalidRequest):  # no template, or one that needs other messages
            chat = self.apply_chat_template([{"role": "user", "content": "a"}])
            encodings.append(self._tokenizer.encode(chat, add_special_tokens=False))
        for encoding in encodings:
            yield from zip(encoding.tokens, encoding.ids, strict=True)
        if self.eos_token_ids:
            first = min(self.eos_token_ids)  # one that the model can sample is enough
            yield self._tokenizer.id_to_token(first) or "the end of text", first

    def _read_eos_ids(self, folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
        """Return the end tokens of generation_config.json, or else config.json, and the tokenizer's own."""
        named = _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        if not named:
            named = _ids(config.get("eos_token_id")) or _ids(_text_config(config).get("eos_token_id"))
        own = self._tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))
        return frozenset(named if own is None else [*named, own])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if the file is missing. Raises ModelNotFound for a broken file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelNotFound(f"{path} cannot be read: {error}.", cure="Download the model again.") from error


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
        raise ModelNotFound(
            f"{path} is not a tokenizer this version of the tokenizers library reads: {error}.",
            cure="Download the model again.",
        ) from error


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
    entries = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    for _, entry in entries:
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
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
