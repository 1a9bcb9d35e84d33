"""The answer to a request as it grows: its tokens become text on the request's HTTP thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from noodle.errors import GenerationFailed
from noodle.wire.messages import TokenLogprob, TokenScore
from services.coordinator.engine.request import FinishReason, PromptComputed, Request, RequestReader
from services.coordinator.text.detokenizer import TextStream
from services.coordinator.text.tokenizer import Tokenizer

CLIENT_LOOK_SECONDS = 0.5  # how late a client that left is noticed while no token comes
REASONS: dict[str, FinishReason | None] = {"": None, "eos": "eos_token", "length": "length"}


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


class Answer:
    """An answer in progress; iterate over it to let it grow. `request` is as it was admitted first."""

    def __init__(self, request: Request, reader: RequestReader, tokenizer: Tokenizer) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.parts: list[Part] = []
        self.prompt_scores: tuple[TokenScore, ...] = ()  # from the prompt's second token on; set before the first part
        self._finish_reason: FinishReason | None = None
        self._reader = reader
        context_ids = request.prompt_token_ids if request.continues_prompt else ()
        self._text_stream = TextStream(tokenizer.decode, request.stop, context_ids=context_ids)

    def __iter__(self) -> Iterator[Part | None]:
        """Yield parts as they come, None when none came for CLIENT_LOOK_SECONDS. Raises what ended the request early.

        Leaving the iteration before its end cancels the request on every stage.
        """
        try:
            while self._finish_reason is None:
                token = self._reader.next(CLIENT_LOOK_SECONDS)
                if token is None:
                    yield None
                    continue
                if isinstance(token, PromptComputed):
                    self.prompt_scores = token.scores
                    self._finish_reason = "length" if token.is_all else None
                    continue
                text_offset = self._text_stream.characters
                text = self._text_stream.push(token.token_id)
                reason = REASONS[token.finish_reason]
                if reason is not None:
                    text += self._text_stream.finish()
                if self._text_stream.finished:
                    reason = "stop_sequence"
                part = Part(token.token_id, text, token.logprob, reason, top=token.top, text_offset=text_offset)
                self.parts.append(part)
                self._finish_reason = reason
                if reason == "stop_sequence":
                    self._reader.finish()  # otherwise the stages would compute tokens that nobody needs
                yield part
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop reading; does nothing after the end."""
        self._reader.cancel()

    def complete(self, client_has_gone: Callable[[], bool]) -> bool:
        """Let the answer grow to its end. Returns False, and cancels it, if the client left before."""
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
        return "".join(part.text for part in self.parts)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def finish_reason(self) -> FinishReason:
        if self._finish_reason is None:
            raise GenerationFailed("The answer was formatted before its end.")
        return self._finish_reason
