"""Vocabularies of GGUF files: those that llama.cpp publishes with their expected ids, and made ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noodle.model import gguf
from noodle.model.gguf import GgufFile
from noodle.model.tensor_entry import TensorEntry
from services.coordinator.text.vocabulary.gguf import GgufVocabulary

SEPARATOR = "\n__ggml_vocab_test__\n"


def read_published(path: Path) -> GgufFile:
    """Read a published vocabulary; `read_gguf` refuses it, because it holds no tensors."""
    return made_file(gguf.read_part(path).metadata, path)


def expected_ids(path: Path) -> list[tuple[str, list[int]]]:
    """Return the texts beside a published vocabulary and their ids, without BOS and EOS."""
    given = path.with_name(f"{path.name}.inp").read_bytes().decode()
    lines = path.with_name(f"{path.name}.out").read_text(encoding="utf-8").splitlines()
    texts = given.removesuffix(SEPARATOR).split(SEPARATOR)
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


def made_file(metadata: Mapping[str, Any], path: Path = Path("made.gguf"), embedding_rows: int = 0) -> GgufFile:
    """Return what a file's header tells, with no tensor but an embedding."""
    embedding = TensorEntry(path, "F32", (embedding_rows, 8), 0, embedding_rows * 32)
    return GgufFile(
        path=path,
        architecture="llama",
        metadata=metadata,
        entries={"token_embd.weight": embedding} if embedding_rows else {},
        parts=(path,),
        header_bytes=(0,),
    )


def vocabulary_of(**values: Any) -> GgufVocabulary:
    """Build a vocabulary from values of `tokenizer.ggml.`; None leaves a key out."""
    return GgufVocabulary(made_file(tokenizer_metadata(**values)))


def tokenizer_metadata(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
