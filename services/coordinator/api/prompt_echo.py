"""A prompt as `echo` gives it back: its text, and its tokens with their log-probabilities; knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from noodle.wire.messages import TokenScore
from services.coordinator.api.logprobs_format import ScoredToken
from services.coordinator.text.detokenizer import text_offsets
from services.coordinator.text.tokenizer import Tokenizer


def prompt_text(prompt: str | tuple[int, ...], tokenizer: Tokenizer) -> str:
    """A text as it came; token ids as what they stand for, marks included."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)


def scored_prompt(
    token_ids: Sequence[int], text: str, scores: Sequence[TokenScore], tokenizer: Tokenizer
) -> list[ScoredToken]:
    """Every token of the prompt; `scores` are those of the second on, for nothing is before the first.

    Offsets are counted back from the text's end: a mark that the tokenizer puts in front is not part of it.
    """
    whole, offsets = text_offsets(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), token_ids)
    shift = len(whole) - len(text)
    first = ScoredToken(token_ids[0], None)
    rest = [
        ScoredToken(token_id, score.logprob, tuple(score.top), max(0, offset - shift))
        for token_id, score, offset in zip(token_ids[1:], scores, offsets[1:], strict=True)
    ]
    return [first, *rest]
