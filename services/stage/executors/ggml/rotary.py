"""Rotary frequencies by the rules of transformers' modeling_rope_utils.py.

longrope uses its short or long factors by the plan's context length, as in transformers/rotary.py: the frequencies
never depend on which sessions share a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rotary:
    """Pair i of the first `2 * len(frequencies)` dimensions of a head rotates by position times `frequencies[i]`."""

    frequencies: Frequencies
    scaling: float  # of cosine and sine


def rotary_of(
    parameters: Mapping[str, Any], head_dim: int, maximum_positions: int, original_positions: int, context_length: int
) -> Rotary:
    """The frequencies that `parameters` (of one layer type in a completed config's rope_parameters) describe."""
    dimensions = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    base = float(parameters["rope_theta"])
    exponents = np.arange(0, dimensions, 2, dtype=np.float32) / np.float32(dimensions)
    wavelengths = np.power(np.float32(base), exponents, dtype=np.float32)
    plain = np.float32(1.0) / wavelengths
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind == "default":
        return Rotary(plain, 1.0)
    if kind == "linear":
        return Rotary(plain / np.float32(parameters["factor"]), 1.0)
    if kind == "llama3":
        if parameters.get("factors") is not None:  # of a GGUF file, which holds what follows from the parameters
            return Rotary(plain / np.asarray(parameters["factors"], np.float32), 1.0)
        return Rotary(_llama3(parameters, plain), 1.0)
    original = int(parameters.get("original_max_position_embeddings") or original_positions)
    factor = float(parameters.get("factor") or maximum_positions / original)
    if kind == "yarn":
        return _yarn(parameters, wavelengths, factor, original)
    if kind in ("longrope", "su"):  # "su" is longrope in Phi-3's first configs
        length = "long" if context_length > original else "short"
        scaling = parameters.get("attention_factor")
        scaling = parameters.get(f"{length}_mscale") if scaling is None else scaling  # as Phi-3.5-MoE says it
        if scaling is None:
            scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        factors = np.asarray(parameters[f"{length}_factor"], np.float32)
        return Rotary(np.float32(1.0) / (factors * wavelengths), float(scaling))
    raise ValueError(f"rotary type {kind!r} must be refused earlier")


def _llama3(parameters: Mapping[str, Any], plain: Frequencies) -> Frequencies:
    """Stretch long waves, keep short ones, and interpolate between them."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    stretched = np.where(wavelengths > original / low, plain / factor, plain)
    return np.where(between, mixed, stretched).astype(np.float32)


def _yarn(parameters: Mapping[str, Any], wavelengths: Frequencies, factor: float, original: int) -> Rotary:
    dimensions, base = 2 * len(wavelengths), float(parameters["rope_theta"])

    def magnitude(scale: float, by: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    def dimension_of(rotations: float) -> float:
        return dimensions * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    scaling = parameters.get("attention_factor")
    if scaling is None:
        by, by_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = magnitude(factor, by) / magnitude(factor, by_all) if by and by_all else magnitude(factor)
    first = dimension_of(float(parameters.get("beta_fast") or 32))
    last = dimension_of(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dimensions - 1)
    width = (last - first) or 0.001
    ramp = np.clip((np.arange(dimensions // 2, dtype=np.float32) - first) / width, 0, 1)
    frequencies = ramp / (factor * wavelengths) + (1 - ramp) / wavelengths
    return Rotary(frequencies.astype(np.float32), float(scaling))
