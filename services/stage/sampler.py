"""Draws the next token from logits by (seed, position) alone (design D3); pure numpy, keeps no state, knows no text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed
from noodle.messages import SamplingParameters

Float32s = npt.NDArray[np.float32]

# below it, float32 can not divide by the temperature; only exact ties are left to chance here
SMALLEST_TEMPERATURE = 1e-30
# so many candidates are sorted; more are halved first
SORTED_CANDIDATES = 1024


def sample(
    logits: Float32s, parameters: SamplingParameters, position: int, with_logprob: bool
) -> tuple[int, float | None]:
    """The token at `position` and, if asked for, its log-probability by the raw logits `[vocab_size]`.

    Temperature 0 takes the largest logit, the lowest id among equals. Else temperature, top_k, top_p in this order, as
    transformers has it, and a draw by inverse distribution in token-id order. Raises GenerationFailed for logits that
    are not finite.
    """
    largest = logits.max()
    if not (np.isfinite(largest) and np.isfinite(logits.min())):
        raise GenerationFailed(
            f"the logits of position {position} are not finite numbers.",
            cure="The model overflows in this dtype: set NOODLE_DTYPE=float32 on the stages.",
        )
    if parameters.temperature == 0:
        token_id = int(logits.argmax())
    else:
        token_id = _draw(logits, largest, parameters, position)
    if not with_logprob:
        return token_id, None
    log_sum = np.log(np.exp(logits - largest).sum(dtype=np.float64))
    return token_id, float(logits[token_id] - largest - log_sum)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same for the same seed and position on every machine."""
    raw = np.random.Philox(key=seed, counter=position).random_raw()
    return float(raw >> 11) * 2.0**-53


def _draw(logits: Float32s, largest: np.float32, parameters: SamplingParameters, position: int) -> int:
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits - largest) / np.float32(max(parameters.temperature, SMALLEST_TEMPERATURE)))
    kept: npt.NDArray[np.intp] | None = None  # token ids in their order; None is all
    if 0 < parameters.top_k < len(weights):
        smallest_kept = np.partition(weights, len(weights) - parameters.top_k)[len(weights) - parameters.top_k]
        kept = np.flatnonzero(weights >= smallest_kept)
        weights = weights[kept]
    if parameters.top_p < 1:
        nucleus = _nucleus(weights, parameters.top_p)
        weights = weights[nucleus]
        kept = nucleus if kept is None else kept[nucleus]
    distribution = np.cumsum(weights, dtype=np.float64)
    chosen = int(np.searchsorted(distribution, uniform(parameters.seed, position) * distribution[-1], side="right"))
    # the product may round up to the sum itself
    chosen = min(chosen, len(distribution) - 1)
    return chosen if kept is None else int(kept[chosen])


def _nucleus(weights: Float32s, top_p: float) -> npt.NDArray[np.intp]:
    """Indices, in order, of the fewest largest weights that make up `top_p` of the sum; among equals the first."""
    wanted = top_p * weights.sum(dtype=np.float64)
    # all weights below this one together miss the part that may be missing
    floor = (1 - top_p) * weights.sum(dtype=np.float64) / len(weights)
    candidates = weights[weights >= floor * 0.999]
    count = 0  # weights known to be in the nucleus, all of them at least as large as any candidate
    while len(candidates) > SORTED_CANDIDATES:
        half = len(candidates) // 2
        parted = np.partition(candidates, half)
        upper_sum = parted[half:].sum(dtype=np.float64)
        if upper_sum >= wanted:
            candidates = parted[half:]
        else:
            wanted -= upper_sum
            count += len(parted) - half
            candidates = parted[:half]
    descending = np.sort(candidates)[::-1]
    place = int(np.searchsorted(np.cumsum(descending, dtype=np.float64), wanted))
    place = min(place, len(descending) - 1)
    count += place + 1
    smallest = descending[place]
    above = weights > smallest
    equal = np.flatnonzero(weights == smallest)[: count - int(np.count_nonzero(above))]
    above[equal] = True
    return np.flatnonzero(above)
