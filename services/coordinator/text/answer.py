"""From tokens to text for one request, on its HTTP thread: detokenises, stops at stop strings.

Knows one reader of a generation and one TextStream, no routes and no wire format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from noodle.wire.messages import TokenLogprob, TokenScore
from services.coordinator.engine.parameters import FinishReason
from services.coordinator.engine.request import GenerationReader, PromptComputed
from services.coordinator.text.detokenizer import TextStream

CLIENT_LOOK_SECONDS = 0.5  # how late a client that left is noticed while no token comes
REASONS: dict[str, FinishReason] = {"eos": "eos_token", "length": "length"}


@dataclass(frozen=True, slots=True)
class Part:
    """One token and the text that it made final; the last part of an answer has its reason.

    `text_offset` is where the token's own text begins, in characters from the answer's beginning.
    """

    token_id: int
    text: str
    logprob: float | None
    finish_reason: FinishReason | None
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int = 0


@dataclass
class Answer:
    """An answer as it grows; iterate over it to let it."""

    generation: GenerationReader
    text_stream: TextStream
    parts: list[Part] = field(default_factory=list)
    prompt_scores: tuple[TokenScore, ...] = ()  # of the prompt's tokens from its second on; here before the first part
    finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[Part | None]:
        """Parts as they come, None whenever none came for CLIENT_LOOK_SECONDS; raises what ended the request early.

        The request is cancelled on every stage when the iteration is left before its end.
        """
        try:
            while self.finish_reason is None:
                token = self.generation.next(CLIENT_LOOK_SECONDS)
                if token is None:
                    yield None
                    continue
                if isinstance(token, PromptComputed):
                    self.prompt_scores = token.scores
                    self.finish_reason = "length" if token.is_all else None
                    continue
                text_offset = self.text_stream.characters
                delta = self.text_stream.push(token.token_id)
                text = delta.text
                reason = REASONS[token.finish_reason] if token.finish_reason else None
                if delta.finished:
                    reason = "stop_sequence"
                elif reason is not None:
                    last = self.text_stream.finish()
                    text += last.text
                    reason = "stop_sequence" if last.finished else reason
                part = Part(token.token_id, text, token.logprob, reason, token.top, text_offset)
                self.parts.append(part)
                self.finish_reason = reason
                if reason == "stop_sequence":
                    self.generation.finish()  # more tokens would come, and nobody needs them
                yield part
        finally:
            self.generation.cancel()  # harmless when it has ended by itself

    def complete(self, client_has_gone: Callable[[], bool]) -> bool:
        """Let the answer grow to its end; False, and cancelled, when the client left before."""
        looked_at = time.monotonic()
        for part in self:
            now = time.monotonic()
            if part is None or now - looked_at >= CLIENT_LOOK_SECONDS:
                looked_at = now
                if client_has_gone():
                    return False
        return True

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(part.text for part in self.parts)


def kept_alive(
    answer: Answer, events: Callable[[Part], Sequence[bytes]], comment: bytes, comment_seconds: float
) -> Iterator[bytes]:
    """The events of a stream, with a comment line while it waits: it tells the client that all is well, and us that
    the client is still there, for only a write shows that it left."""
    written_at = time.monotonic()
    for part in answer:
        if part is None:
            if time.monotonic() - written_at >= comment_seconds:
                yield comment
                written_at = time.monotonic()
            continue
        for event in events(part):
            yield event
            written_at = time.monotonic()
