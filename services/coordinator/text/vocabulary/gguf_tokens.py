"""The tokens of a GGUF file's metadata, checked: their kinds, which begin and end a text, which end an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from noodle.errors import UnsupportedModel
from noodle.model.gguf import GgufFile
from services.coordinator.text.token_texts import BYTE_TOKEN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
EMBEDDING = "token_embd.weight"
PREFIX = "tokenizer.ggml."
CURE = "Use another GGUF file of this model, or its safetensors."

# how chat templates name a token, and the key of its id
NAMED_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
END_KEYS = ("eos", "eot", "eom")
# tokens that end an answer by their names, whatever the file says
END_NAMES = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
    # a model that fills in the middle goes on with another file after these
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
)
# ends an answer only where the file marks it as a control token: in gemma's vocabulary it is the tag of HTML
END_NAME_IF_CONTROL = "</s>"
# control tokens by their names, whatever the file says
CONTROL_NAMES = (
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<\uff5cfim\u2581begin\uff5c>",
    "<PRE>",
    "\u2581<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<\uff5cfim\u2581hole\uff5c>",
    "<SUF>",
    "\u2581<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<\uff5cfim\u2581end\uff5c>",
    "<MID>",
    "\u2581<MID>",
    "<|code_middle|>",
    "<|middle|>",
)
# parts of an answer's text, in vocabularies that have all of CHANNEL_NAMES (gpt-oss)
CHANNEL_NAMES = {"<|channel|>", "<|message|>"}
SHOWN_NAMES = (*sorted(CHANNEL_NAMES), "<|start|>", "<|constrain|>")
# where these end an answer, <|end|> ends a message within it
MESSAGE_END, ANSWER_ENDS = (
    "<|end|>",
    ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}, {"<|call|>", "<|flush|>"}),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokens:
    """`kinds` has a byte for each token, `ids_by_name` bos, eos, ..., as far as the file has them."""

    tokens: list[str]
    ids: dict[str, int]
    kinds: bytearray
    ids_by_name: Mapping[str, int]
    end_ids: frozenset[int]


def refusal(file: GgufFile, problem: str, cure: str = CURE) -> UnsupportedModel:
    return UnsupportedModel(f"{file.path}: {problem}.", cure=cure)


def read_tokens(file: GgufFile, default_ids: Mapping[str, int]) -> GgufTokens:
    """Read and check the tokens; `default_ids` are the ids by name that the file's kind of tokenizer implies.

    Raises UnsupportedModel for tokens that are missing, twice or no text, and for lists and ids that do not fit.
    """
    _check_counts(file)
    tokens = file.array(f"{PREFIX}tokens") or []
    if not all(isinstance(token, str) for token in tokens):
        raise refusal(file, f"{PREFIX}tokens is not a list of texts")
    _check_encoding(file, tokens)
    if "" in tokens:
        tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        token_id, twice = next((token_id, token) for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise refusal(
            file,
            f"{len(tokens) - len(ids)} of the {len(tokens)} tokens of {PREFIX}tokens are there twice, the first is "
            f"{twice!r} with the ids {token_id} and {ids[twice]}",
        )
    kinds = _read_kinds(file, tokens)
    named = _read_ids(file, len(tokens), default_ids)
    end_ids = _mark_ends(ids, kinds) | {named[name] for name in END_KEYS if name in named}
    has_kinds = file.count_of(f"{PREFIX}token_type") is not None
    for token_id in end_ids if has_kinds else {*end_ids, *named.values()}:
        kinds[token_id] = CONTROL
    return GgufTokens(tokens=tokens, ids=ids, kinds=kinds, ids_by_name=named, end_ids=frozenset(end_ids))


def read_flag(file: GgufFile, name: str, default: bool) -> bool:
    """Read a setting that is true or false. Raises UnsupportedModel for another value."""
    value = file.metadata.get(PREFIX + name, default)
    if value not in (True, False):
        raise refusal(file, f"{PREFIX}{name} is {str(value)[:40]!r}, not true or false")
    return bool(value)


def read_scores(file: GgufFile) -> list[float]:
    scores = file.array(f"{PREFIX}scores")
    if scores is None:
        raise refusal(file, f"its tokenizer has no scores ({PREFIX}scores is missing), by which its tokens merge")
    if not all(isinstance(score, int | float) and score == score for score in scores):  # not a number
        raise refusal(file, f"{PREFIX}scores is not a list of numbers")
    return scores


def _check_counts(file: GgufFile) -> None:
    count = file.count_of(f"{PREFIX}tokens")
    if count is None:
        raise refusal(
            file,
            f"it holds no tokenizer ({PREFIX}tokens is missing)",
            "Use a file of the whole model, not a part of it.",
        )
    if not count:
        raise refusal(file, f"its tokenizer has no tokens ({PREFIX}tokens is empty)")
    for name in ("token_type", "scores"):
        other = file.count_of(PREFIX + name)
        if other not in (None, count):
            raise refusal(file, f"{PREFIX}{name} has {other} items for {count} tokens")
    embedding = file.entries.get(EMBEDDING)
    if embedding is not None and embedding.shape[0] != count:
        raise refusal(file, f"its tokenizer has {count} tokens, but {EMBEDDING} has {embedding.shape[0]} rows")


def _check_encoding(file: GgufFile, tokens: list[str]) -> None:
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        for token_id, token in enumerate(tokens):
            if any("\ud800" <= character <= "\udfff" for character in token):
                raw = token.encode(errors="surrogateescape")
                raise refusal(file, f"token {token_id} of {PREFIX}tokens is not UTF-8: {raw[:40]!r}") from None
        raise


def _read_kinds(file: GgufFile, tokens: list[str]) -> bytearray:
    """Return a kind for each token; numbers without a meaning and a file without kinds count as normal."""
    values = file.array(f"{PREFIX}token_type")
    if values is None:
        return bytearray(BYTE if BYTE_TOKEN.fullmatch(token) else NORMAL for token in tokens)
    if not all(isinstance(value, int) for value in values):
        raise refusal(file, f"{PREFIX}token_type is not a list of numbers")
    kinds = bytearray(value if NORMAL <= value <= BYTE else NORMAL for value in values)
    at = kinds.find(BYTE)
    while at >= 0:
        if BYTE_TOKEN.fullmatch(tokens[at]) is None:
            raise refusal(file, f"token {at} is {tokens[at]!r}, but {PREFIX}token_type says that it is a byte")
        at = kinds.find(BYTE, at + 1)
    return kinds


def _read_ids(file: GgufFile, count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    found = {name: token_id for name, token_id in defaults.items() if token_id < count}
    for name in (*END_KEYS, *NAMED_TOKENS.values()):
        key = f"{PREFIX}{name}_token_id"
        value = file.metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise refusal(file, f"{key} is {str(value)[:40]}, but the tokens have the ids 0 to {count - 1}")
        found[name] = value
    return found


def _mark_ends(ids: Mapping[str, int], kinds: bytearray) -> set[int]:
    """Set the kinds of tokens that are known by their names. Returns the ids that end an answer."""
    for name in (*END_NAMES, *CONTROL_NAMES):
        if name in ids:
            kinds[ids[name]] = CONTROL
    ends = {name for name in END_NAMES if name in ids}
    if END_NAME_IF_CONTROL in ids and kinds[ids[END_NAME_IF_CONTROL]] == CONTROL:
        ends.add(END_NAME_IF_CONTROL)
    shown = [name for name in SHOWN_NAMES if name in ids and ids.keys() >= CHANNEL_NAMES]
    if MESSAGE_END in ends and any(others <= ends for others in ANSWER_ENDS):
        ends.remove(MESSAGE_END)
        shown.append(MESSAGE_END)
    for name in shown:
        kinds[ids[name]] = USER_DEFINED
    return {ids[name] for name in ends}
