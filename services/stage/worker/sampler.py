"""Samples the next token from logits, by (seed, position) alone and without state (design D3)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed
from noodle.wire.messages import SamplingParameters
from services.stage.worker.logprobs import NOT_FINITE_CURE, Float32s, log_normalizer

SMALLEST_TEMPERATURE = 1e-30  # float32 cannot divide by less; at this one only exact ties are left to chance
SORTED_CANDIDATES = 512  # at most this many are sorted; more are split at their mean first
BLOCK = 64  # weights summed at once; makes a running sum over a vocabulary cheap


def sample(
    logits: Float32s, parameters: SamplingParameters, position: int, with_logprob: bool
) -> tuple[int, float | None]:
    """Return the token at `position` and, if asked for, its log-probability by the raw logits `[vocab_size]`.

    Temperature 0 takes the largest logit, the lowest id among equals. Otherwise temperature, top_k and top_p apply in
    the order of transformers, and the token is drawn by inverse distribution in token-id order. Raises GenerationFailed
    for logits that are not finite.
    """
    largest = logits.max()
    if not (np.isfinite(largest) and np.isfinite(logits.min())):
        raise GenerationFailed(
            f"the logits of position {position} are not finite numbers (NaN or infinite).",
            cure=NOT_FINITE_CURE,
        )
    if parameters.temperature == 0:
        token_id = int(logits.argmax())
    else:
        token_id = _draw(logits, largest, parameters, position)
    if not with_logprob:
        return token_id, None
    _, log_sum = log_normalizer(logits)
    return token_id, float(logits[token_id] - largest) - log_sum


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1), the same on every machine for the same seed and position."""
    raw = np.random.Philox(key=seed, counter=position).random_raw()
    return float(raw >> 11) * 2.0**-53


def _draw(logits: Float32s, largest: np.float32, parameters: SamplingParameters, position: int) -> int:
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits - largest) / np.float32(max(parameters.temperature, SMALLEST_TEMPERATURE)))
    # tokens that top_k and top_p exclude get weight 0
    if 0 < parameters.top_k < len(weights):
        weights *= weights >= _largest_but(weights, parameters.top_k)
    if parameters.top_p < 1:
        weights *= _nucleus(weights, parameters.top_p)
    return _inverse_distribution(weights, uniform(parameters.seed, position))


def _inverse_distribution(weights: Float32s, fraction: float) -> int:
    """The first index at which the running sum exceeds `fraction` of the total; by blocks, then within one."""
    whole = len(weights) - len(weights) % BLOCK
    sums = weights[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    distribution = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    target = fraction * distribution[-1]
    block = _first_above(distribution, target)
    before = distribution[block - 1] if block else 0.0
    inside = weights[block * BLOCK : (block + 1) * BLOCK].astype(np.float64).cumsum()
    return block * BLOCK + _first_above(inside, target - before)


def _first_above(distribution: npt.NDArray[np.float64], target: float) -> int:
    """The first index whose running sum is above `target`; rounding never passes the last non-zero weight."""
    below_all = np.nextafter(distribution[-1], 0)
    return int(np.searchsorted(distribution, min(target, below_all), side="right"))


def _largest_but(weights: Float32s, count: int) -> np.float32:
    """The `count`-th largest weight."""
    whole = len(weights) - len(weights) % BLOCK
    if count <= whole // BLOCK:
        # `count` blocks have a weight at least this large, so the wanted weights do too
        block_maxima = weights[:whole].reshape(-1, BLOCK).max(1)
        at_least = np.partition(block_maxima, len(block_maxima) - count)[len(block_maxima) - count]
        weights = np.compress(weights >= at_least, weights)
    smallest: np.float32 = np.partition(weights, len(weights) - count)[len(weights) - count]
    return smallest


def _nucleus(weights: Float32s, top_p: float) -> npt.NDArray[np.bool_]:
    """Mask of the fewest largest weights that make up `top_p` of the sum; among equals the first."""
    total = weights.sum(dtype=np.float64)
    wanted = top_p * total
    candidates = weights
    # all weights below this one together are less than may be missing from the nucleus
    may_be_kept = weights >= np.float32((1 - top_p) * total / len(weights) * 0.999)
    if np.count_nonzero(may_be_kept) < len(weights) // 2:
        candidates = np.compress(may_be_kept, weights)
    count = 0  # weights in the nucleus that are larger than every candidate
    smallest, largest = candidates.min(), candidates.max()
    while len(candidates) > SORTED_CANDIDATES and smallest < largest:
        # above the smallest and at most the largest, so that neither side is empty
        pivot = max(np.float32(candidates.mean(dtype=np.float64)), np.nextafter(smallest, largest))
        is_upper = candidates >= pivot
        upper_sum = (candidates * is_upper).sum(dtype=np.float64)
        if upper_sum >= wanted:
            candidates = np.compress(is_upper, candidates)
        else:
            wanted -= upper_sum
            count += int(np.count_nonzero(is_upper))
            candidates = np.compress(~is_upper, candidates)
        smallest, largest = candidates.min(), candidates.max()
    if smallest == largest:
        count += min(math.ceil(wanted / float(smallest)), len(candidates))
    else:
        descending = np.sort(candidates)[::-1]
        place = int(np.searchsorted(np.cumsum(descending.astype(np.float64)), wanted))
        place = min(place, len(descending) - 1)
        smallest = descending[place]
        count += place + 1
    is_kept: npt.NDArray[np.bool_] = weights >= smallest
    surplus = int(np.count_nonzero(is_kept)) - count
    if surplus > 0:
        is_kept[np.flatnonzero(weights == smallest)[-surplus:]] = False
    return is_kept
