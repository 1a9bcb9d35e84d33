"""Answers that come without a cluster, for tests of how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from services.coordinator.engine.request import FinishReason, Request
from services.coordinator.text.answer import Part

NAMES = {1: "he", 2: "llo", 3: "</s>"}
TEXTS = SimpleNamespace(
    text_of=NAMES.__getitem__, name_of=NAMES.__getitem__, bytes_of=lambda token_id: NAMES[token_id].encode()
)
TOKENIZER: Any = SimpleNamespace(texts=TEXTS, is_special=lambda token_id: token_id == 3)


@dataclass
class MadeAnswer:
    """Parts that come one by one."""

    request: Request
    coming: Sequence[Part]
    parts: list[Part] = field(default_factory=list)
    prompt_scores: tuple[Any, ...] = ()
    tokenizer: Any = field(default_factory=lambda: TOKENIZER)

    def __iter__(self) -> Iterator[Part]:
        for part in self.coming:
            self.parts.append(part)
            yield part

    def cancel(self) -> None:
        pass

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.parts[-1].finish_reason


def answer_to(request: Request, parts: Sequence[Part], *, complete: bool = False) -> Any:
    """An answer to a prompt of 4 tokens that comes, or with `complete` is there."""
    request = replace(request, prompt_token_ids=[1, 2, 1, 2], answer_id="chatcmpl-1", created_unix_seconds=5)
    return MadeAnswer(request, parts, list(parts) if complete else [])
