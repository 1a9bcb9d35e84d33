"""Number formats of weights and KV rows: names, bytes, and the allowed loss against float32.

`f32` to `q4_K` are ggml's names; `gguf` is the format of a .gguf file. `exact` means f32 weights and f32 KV rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

WEIGHT_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_K": 144 / 256}
KV_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
WEIGHTS = (*WEIGHT_ITEM_BYTES, "gguf")
FORMAT_BY_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # of the dtypes of transformers
DTYPE_BY_FORMAT = {name: dtype for dtype, name in FORMAT_BY_DTYPE.items()}
EXECUTORS = ("transformers", "ggml")


class Quality(Struct, frozen=True):
    """Loss of a format against float32, on the text that comes with noodle."""

    perplexity_ratio: float
    greedy_agreement: float  # share of tokens with the same likeliest next token
    tokens: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """Loss against float32 that a value of NOODLE_QUALITY allows."""

    perplexity_ratio: float
    greedy_agreement: float


# Measured on the default model, which is often undecided between two tokens: q8_0 1.003 and 95 %, f16 1.000 and 99.9 %,
# q4_0 1.30 and 60 %. Perplexity decides; the agreement catches a format that is badly wrong in a few places.
ALLOWANCES = {
    "exact": Allowance(1.0, 1.0),
    "near-lossless": Allowance(1.01, 0.90),
    "small": Allowance(1.10, 0.70),
}


def is_lossless(weights: str, kv_dtype: str) -> bool:
    """Whether a stage computes as exactly as float32."""
    return (weights, kv_dtype) == ("f32", "f32")


def why_refused(quality: Quality, wanted: str) -> str:
    """Return why a format does not meet NOODLE_QUALITY, empty when it does."""
    allowed = ALLOWANCES[wanted]
    if not quality.perplexity_ratio <= allowed.perplexity_ratio:  # refuses NaN too
        return f"perplexity times {quality.perplexity_ratio:.3f}, {wanted} allows {allowed.perplexity_ratio:g}"
    if quality.greedy_agreement < allowed.greedy_agreement:
        return f"{quality.greedy_agreement:.1%} of greedy tokens agree, {wanted} needs {allowed.greedy_agreement:.0%}"
    return ""
