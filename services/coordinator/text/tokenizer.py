"""A model's tokenizer: text to token ids and back, and prompts of conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from noodle.errors import ContextTooLong, InvalidRequest, NoodleError
from noodle.model.gguf import read_gguf
from services.coordinator.text.chat_template import ChatTemplate, read_chat_template
from services.coordinator.text.token_texts import TokenTexts
from services.coordinator.text.vocabulary.base import Piece, Vocabulary
from services.coordinator.text.vocabulary.folder import FolderVocabulary
from services.coordinator.text.vocabulary.gguf import GgufVocabulary, read_chat_templates

MINIMUM_LONGEST_TOKEN = 16  # characters; so that a vocabulary of single bytes still accepts ordinary texts


class Tokenizer:
    """One model's tokenizer; threads may share it.

    `eos_token_ids` end an answer. `vocabulary_size` is the number of rows of the model's embedding, above every id of
    a prompt.
    """

    def __init__(self, model: Path) -> None:
        """Load it from a model's folder or GGUF file.

        Raises ModelNotFound if a file is missing or broken, UnsupportedModel if it is another model's or not known.
        """
        self._vocabulary, self._chat_template = _read_folder(model) if model.is_dir() else _read_gguf(model)
        self._longest_token = max(MINIMUM_LONGEST_TOKEN, self._vocabulary.longest_token)
        self.vocabulary_size = self._vocabulary.size
        self.eos_token_ids = self._vocabulary.end_ids
        self.texts = TokenTexts(self._vocabulary.bytes_of)
        if isinstance(self._vocabulary, FolderVocabulary):
            self._vocabulary.refuse_foreign_tokenizer(self._chat_of_one_message())

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
        ids = self._vocabulary.encode(text, add_special_tokens)
        if ids and max(ids) >= self.vocabulary_size:
            token = self._vocabulary.token_of(max(ids))
            raise InvalidRequest(f"The prompt holds {token!r}, for which this model has no embedding.")
        return ids

    def fewest_tokens(self, texts: Iterable[str]) -> int:
        """Return the least number of tokens of some texts: as if each were the vocabulary's longest."""
        return -(-sum(map(len, texts)) // self._longest_token)

    def pieces(self, text: str, add_special_tokens: bool) -> list[Piece]:
        """Return the tokens of a text of any length, each with its place in it."""
        return self._vocabulary.pieces(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Ids outside the vocabulary have none; invalid UTF-8 becomes U+FFFD."""
        return self._vocabulary.decode(token_ids, skip_special_tokens)

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
        return self._chat_template.render(messages, add_generation_prompt)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model answers messages; without a template it only continues a prompt."""
        return self._chat_template is not None

    @property
    def chat_notes(self) -> Sequence[str]:
        """What trying the chat template showed, a sentence each."""
        return self._chat_template.notes if self._chat_template else ()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._vocabulary.special_ids

    def _chat_of_one_message(self) -> str:
        with contextlib.suppress(NoodleError):  # no template, or one that needs other messages
            return self.apply_chat_template([{"role": "user", "content": "a"}])
        return ""


def _read_folder(folder: Path) -> tuple[Vocabulary, ChatTemplate | None]:
    vocabulary = FolderVocabulary(folder)
    return vocabulary, read_chat_template(folder, vocabulary.settings, vocabulary.special_tokens)


def _read_gguf(path: Path) -> tuple[Vocabulary, ChatTemplate | None]:
    file = read_gguf(path)
    vocabulary = GgufVocabulary(file)
    source = read_chat_templates(file).get("default")
    return vocabulary, None if source is None else ChatTemplate(source, path, vocabulary.special_tokens)
