"""The vocabulary that a GGUF file's metadata describes, with the ids that llama.cpp gives."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from noodle.model.gguf import GgufFile
from services.coordinator.text.token_texts import BYTE_TOKEN, WORD_MARK, byte_of_character
from services.coordinator.text.vocabulary.base import Piece
from services.coordinator.text.vocabulary.byte_pairs import RankedMerging, read_merges
from services.coordinator.text.vocabulary.gguf_tokens import (
    BYTE,
    CONTROL,
    CURE,
    NAMED_TOKENS,
    NORMAL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufTokens,
    read_flag,
    read_scores,
    read_tokens,
    refusal,
)
from services.coordinator.text.vocabulary.pre_tokenizers import DEFAULT, GEMMA4, PRE_TOKENIZERS, PreTokenizer
from services.coordinator.text.vocabulary.sentencepiece import ScoredMerging
from services.coordinator.text.vocabulary.special_tokens import SpecialTokens

TEMPLATE_KEY = "tokenizer.chat_template"
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# tokenizer.ggml.model: why it is refused
REFUSED_KINDS = {
    "bert": "WordPiece, which models that only embed text use",
    "t5": "Unigram, which models with an encoder use",
    "rwkv": "of RWKV models",
    "plamo2": "of PLaMo 2 models",
    "hybriddna": "of models of DNA",
    "whitespace": "of models that only embed text",
    "none": "none: the file has no tokenizer",
    "no_vocab": "none: the file has no tokenizer",
}
KNOWN_KINDS = ("gpt2", "llama", "gemma4")
WHOLE_KINDS = (CONTROL, USER_DEFINED, UNKNOWN)  # never cut, and never merged with their neighbours
HIDDEN_KINDS = (CONTROL, UNKNOWN)  # left out of a decoded answer

log = logging.getLogger(__name__)


class Merging(Protocol):
    """How ordinary text becomes tokens."""

    def encode(self, text: str) -> list[int]: ...

    def places(self, text: str) -> list[tuple[int, int, int]]: ...


class GgufVocabulary:
    """Threads may share it. Raises UnsupportedModel for a tokenizer that is broken or of a kind that is not known."""

    def __init__(self, file: GgufFile) -> None:
        kind = file.metadata.get(f"{PREFIX}model")
        pre = _pre_tokenizer(file, kind)
        found = read_tokens(file, SENTENCEPIECE_IDS if kind == "llama" else {})
        self._tokens, self._kinds = found.tokens, found.kinds
        self._byte_level = pre is not None and pre.is_byte_level
        self._prefixes_space = pre is None and read_flag(file, "add_space_prefix", default=True)
        self._merging = self._build_merging(file, found, pre)
        whole = {found.tokens[place]: place for place, kind in enumerate(found.kinds) if kind in WHOLE_KINDS}
        self._special = SpecialTokens(whole, _stripping_ids(file, whole))
        adds_bos = read_flag(file, "add_bos_token", default=pre is None or pre.adds_bos) or pre is GEMMA4
        self._first = _added(file, found, "bos") if adds_bos else []
        self._last = _added(file, found, "eos") if read_flag(file, "add_eos_token", default=False) else []
        self.size = len(found.tokens)
        self.longest_token = max(map(len, found.tokens))
        self.special_ids = frozenset(token_id for token_id, kind in enumerate(found.kinds) if kind in HIDDEN_KINDS)
        self.special_tokens = {
            name: found.tokens[found.ids_by_name[key]] for name, key in NAMED_TOKENS.items() if key in found.ids_by_name
        }
        self.end_ids = found.end_ids

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._first) if add_special_tokens else []
        for start, stop, token_id in self._special.split(text):
            if token_id is None:
                ids += self._merging.encode(text[start:stop])
            else:
                ids.append(token_id)
        return ids + self._last if add_special_tokens else ids

    def pieces(self, text: str, add_special_tokens: bool) -> list[Piece]:
        first, last = (self._first, self._last) if add_special_tokens else ([], [])
        pieces = [Piece(token_id, 0, 0) for token_id in first]
        for start, stop, token_id in self._special.split(text):
            if token_id is not None:
                pieces.append(Piece(token_id, start, stop))
                continue
            places = self._merging.places(text[start:stop])
            pieces += [Piece(token_id, start + begin, start + end) for token_id, begin, end in places]
        return pieces + [Piece(token_id, 0, 0) for token_id in last]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Ids outside the vocabulary have none; invalid UTF-8 becomes U+FFFD.

        If the vocabulary puts a space before a text, the text of the ids begins without one.
        """
        shown = [token_id for token_id in token_ids if not (skip_special_tokens and token_id in self.special_ids)]
        text = b"".join(map(self.bytes_of, shown))
        return (text.removeprefix(b" ") if self._prefixes_space else text).decode(errors="replace")

    def token_of(self, token_id: int) -> str | None:
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    def bytes_of(self, token_id: int) -> bytes:
        """Return a token's bytes, spaces included; none for an id outside the vocabulary or of an unused token."""
        token = self.token_of(token_id)
        if token is None:
            return b""
        kind = self._kinds[token_id]
        if kind == UNUSED:
            return b""
        if kind == BYTE and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if kind != NORMAL:
            return token.encode()
        if not self._byte_level:
            return token.replace(WORD_MARK, " ").encode()
        return b"".join(_bytes_of_characters(token))

    def _build_merging(self, file: GgufFile, found: GgufTokens, pre: PreTokenizer | None) -> Merging:
        if pre is None:
            unknown_id = found.ids_by_name.get("unknown")
            return ScoredMerging(found.ids, read_scores(file), unknown_id, prefixes_space=self._prefixes_space)
        merges = read_merges(_merge_lines(file), file.path)  # the lines are not kept while the model is built
        return RankedMerging(found.ids, merges, pre, file.path)


def read_chat_templates(file: GgufFile) -> dict[str, str]:
    """Return the file's chat templates by name; the one without a name is "default"."""
    templates = {"default": file.metadata.get(TEMPLATE_KEY)}
    for key, value in file.metadata.items():
        if key.startswith(f"{TEMPLATE_KEY}."):
            templates[key.removeprefix(f"{TEMPLATE_KEY}.")] = value
    return {name: source for name, source in templates.items() if isinstance(source, str) and source}


def _pre_tokenizer(file: GgufFile, kind: object) -> PreTokenizer | None:
    """Return how text is split before it is merged by ranks; None for merging by scores."""
    if kind == "llama":
        return None
    if kind == "gemma4":
        return GEMMA4
    key = f"{PREFIX}model"
    if kind is None:
        raise refusal(file, f"it does not say of what kind its tokenizer is ({key} is missing)")
    if kind != "gpt2":
        why = REFUSED_KINDS.get(str(kind), f"not known; known are {', '.join(KNOWN_KINDS)}")
        raise refusal(file, f"its tokenizer ({key} = {str(kind)[:40]!r}) is {why}")
    name = file.metadata.get(f"{PREFIX}pre")
    if not name:
        log.warning("%s does not name its pre-tokenizer (%spre): llama.cpp's default is used", file.path, PREFIX)
        return DEFAULT
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        near = difflib.get_close_matches(str(name)[:60], PRE_TOKENIZERS, n=1, cutoff=0.0)
        raise refusal(
            file,
            f"its pre-tokenizer {PREFIX}pre = {str(name)[:60]!r} is not known; the nearest known name is {near[0]!r}",
            f"{CURE} A newer noodle may know it.",
        )
    return PRE_TOKENIZERS[name]


def _merge_lines(file: GgufFile) -> list[str]:
    lines = file.array(f"{PREFIX}merges")
    if lines is None:
        raise refusal(file, f"its tokenizer has no merges ({PREFIX}merges is missing)")
    if not all(isinstance(line, str) for line in lines):
        raise refusal(file, f"{PREFIX}merges is not a list of texts")
    return lines


def _added(file: GgufFile, found: GgufTokens, name: str) -> list[int]:
    """Return the token that is added before or after a text, if the file names it."""
    if name in found.ids_by_name:
        return [found.ids_by_name[name]]
    log.warning(
        "%s adds a token (%sadd_%s_token) that it does not name (%s%s_token_id)", file.path, PREFIX, name, PREFIX, name
    )
    return []


def _stripping_ids(file: GgufFile, whole: dict[str, int]) -> list[int]:
    """Return the tokens that swallow the white space after them: phi 3's, which a file shows by its name alone."""
    name = str(file.metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return []
    kept = ("<unk>", "<s>", "<|endoftext|>")
    return [token_id for token, token_id in whole.items() if token not in kept]


def _bytes_of_characters(token: str) -> Iterator[bytes]:
    alphabet = byte_of_character()
    for character in token:
        byte = alphabet.get(character)
        yield character.encode() if byte is None else bytes([byte])
