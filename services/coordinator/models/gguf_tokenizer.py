"""Make tokenizer.json and its companions from a GGUF file's metadata, for byte-level BPE.

`tokenizer.ggml.pre` names the pre-tokenizer, which splits text before merging. The splits below are llama.cpp's; those
of llama 3 and qwen2 equal transformers', which does not know smollm's and joins its digits to the spaces before them.
An unknown name is refused, because a wrong split gives other tokens without any error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from noodle.errors import UnsupportedModel

CONTROL_TOKEN = 3  # never split, left out of decoded text
USER_DEFINED_TOKEN = 4  # never split, but decoded like other text

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
KNOWN_PRE_TOKENIZERS = ("smollm", "gpt-2", *LLAMA3_NAMES, "qwen2")
CURE = "Use another GGUF file of this model, or its safetensors."


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    `metadata` holds a GGUF's `tokenizer.*` values as Python values. Raises UnsupportedModel unless the tokenizer is
    byte-level BPE with a known pre-tokenizer.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UnsupportedModel(
            "The GGUF file holds no tokenizer (tokenizer.ggml.tokens is missing).",
            cure="Use a file of the whole model, not one of its parts.",
        )
    tokenizer = build_tokenizer(metadata)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **_special_tokens(metadata, tokens),
    }
    if "tokenizer.chat_template" in metadata:
        tokenizer_config["chat_template"] = metadata["tokenizer.chat_template"]
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", generation_ids(metadata))


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    model_kind = metadata.get("tokenizer.ggml.model")
    if model_kind != "gpt2":
        raise UnsupportedModel(
            f"The GGUF file's tokenizer is of kind {model_kind!r}; only byte-level BPE (gpt2) is supported.",
            cure="Convert it where torch is installed: noodle convert FILE FOLDER",
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UnsupportedModel(
            f"The GGUF file's tokenizer has {len(tokens) - len(vocabulary)} tokens twice.", cure=CURE
        )
    pre_name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    merges = _merges(metadata.get("tokenizer.ggml.merges"))
    # llama 3's vocabulary holds words that its merges cannot produce
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_name in LLAMA3_NAMES))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre_name)
    if pre_name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, tokens)
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    for added_type, add in ((CONTROL_TOKEN, tokenizer.add_special_tokens), (USER_DEFINED_TOKEN, tokenizer.add_tokens)):
        added = [token for token, its_type in zip(tokens, types, strict=True) if its_type == added_type]
        add([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def generation_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin, end and pad a generation, under transformers' names; absent ones are left out."""
    bos, eos, eot, padding = (
        metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")
    )
    # a chat turn may end with another token than a text (llama 3): both end a generation
    ends = list(dict.fromkeys(end for end in (eos, eot) if end is not None))
    ids = {
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": padding,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        # digits are split off first, so spaces before a number stay together
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name in LLAMA3_NAMES or name == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT if name == "qwen2" else LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UnsupportedModel(
        f"The GGUF file's tokenizer has the pre-tokenizer {name!r}; known are {', '.join(KNOWN_PRE_TOKENIZERS)}.",
        cure="Convert it where torch is installed (noodle convert FILE FOLDER), or use the model's safetensors.",
    )


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> processors.PostProcessor:
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", False) or bos_id is None:
        return processors.ByteLevel(trim_offsets=False)
    bos = _token_at(tokens, bos_id)
    # ByteLevel sets the offsets, the template puts BOS in front
    return processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
            ),
        ]
    )


def _merges(lines: Any) -> list[tuple[str, str]]:
    if not isinstance(lines, list):
        raise UnsupportedModel("The GGUF file's tokenizer has no merges (tokenizer.ggml.merges is missing).", cure=CURE)
    pairs = []
    for line in lines:
        first, space, second = line.partition(" ")
        if not space:
            raise UnsupportedModel(
                f"The GGUF file's tokenizer has a merge that is not two tokens: {line!r}.", cure=CURE
            )
        pairs.append((first, second))
    return pairs


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: _token_at(tokens, token_id) for name, token_id in ids.items() if token_id is not None}


def _token_at(tokens: list[str], token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise UnsupportedModel(
            f"The GGUF file names token {token_id} as special, but has only {len(tokens)} tokens.", cure=CURE
        )
    return tokens[token_id]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
