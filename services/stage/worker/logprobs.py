"""Log-probabilities by the raw logits, before temperature, top_k and top_p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed
from noodle.wire.messages import TokenLogprob, TokenScore

Float32s = npt.NDArray[np.float32]
NOT_FINITE_CURE = (
    "The model's file may be damaged: fetch it again. If it is whole, it overflows in 16 bits: set "
    "NOODLE_QUALITY=exact, or NOODLE_DTYPE=float32 where transformers computes."
)


def log_normalizer(logits: Float32s) -> tuple[np.float32, float]:
    """The largest logit of `[vocab_size]`, and the logarithm of the sum of exp(logit - largest).

    Subtract both from a logit, one after the other, to get its log-probability.
    """
    largest = logits.max()
    return largest, float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))


def likeliest(logits: Float32s, count: int) -> list[TokenLogprob]:
    """The `count` likeliest tokens of `[vocab_size]` logits, likeliest first, the lower id among equals."""
    count = min(count, len(logits))
    if count == 0:
        return []
    largest, log_sum = log_normalizer(logits)
    smallest = np.partition(logits, len(logits) - count)[len(logits) - count]
    candidates = np.flatnonzero(logits >= smallest)
    best = candidates[np.argsort(-logits[candidates], kind="stable")[:count]]
    return [TokenLogprob(int(token_id), float(logits[token_id] - largest) - log_sum) for token_id in best]


def score(logits: Float32s, token_ids: Sequence[int], top: int) -> list[TokenScore]:
    """Score the token of each row of `[rows, vocab_size]`, and the `top` likeliest tokens there.

    Raises GenerationFailed for logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise GenerationFailed(
            "the logits of a prompt's tokens are not finite numbers.",
            cure=NOT_FINITE_CURE,
        )
    scores = []
    for row, token_id in zip(logits, token_ids, strict=True):
        largest, log_sum = log_normalizer(row)
        scores.append(TokenScore(float(row[token_id] - largest) - log_sum, likeliest(row, top)))
    return scores
