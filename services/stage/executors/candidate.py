"""Which ways of computing a stage compares before it chooses one; pure: knows settings, not machines or models."""

from __future__ import annotations

from dataclasses import dataclass

from noodle.errors import ConfigurationError
from noodle.model.formats import DTYPE_BY_FORMAT, FORMAT_BY_DTYPE, is_lossless

# What is compared where nothing is set. 16 bits in both forms: which one a processor has its own instructions for shows
# in the measurement. q4_K takes rows of 256 numbers, which many small models have not: who wants it says so.
GGML_WEIGHTS = {
    "exact": ("f32",),
    "near-lossless": ("q8_0", "f16", "bf16", "f32"),
    "small": ("q4_0", "q8_0", "f16", "bf16", "f32"),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute: the executor, its formats of weights and of KV rows, and the dtype of hidden states."""

    executor: str
    weights: str
    kv_dtype: str
    dtype: str

    @property
    def is_lossless(self) -> bool:
        """Whether its results are float32's."""
        return is_lossless(self.weights, self.kv_dtype)

    def __str__(self) -> str:
        return f"{self.executor} {self.weights}"


@dataclass(frozen=True, slots=True)
class Wishes:
    """NOODLE_EXECUTOR, _WEIGHTS, _QUALITY and _DTYPE, which noodle.config has checked against one another."""

    executor: str = "auto"
    weights: str = "auto"
    quality: str = "near-lossless"
    dtype: str = "auto"


def asks_for_ggml(wishes: Wishes) -> bool:
    """Whether the executor, or weights that only ggml has, is named."""
    return wishes.executor == "ggml" or wishes.weights not in ("auto", *DTYPE_BY_FORMAT)


def candidates(
    wishes: Wishes, dtype: str, ggml_hindrance: str, *, has_gguf: bool = False, only_ggml: str = ""
) -> tuple[Candidate, ...]:
    """All that may be compared; `dtype` is what transformers would take here, `ggml_hindrance` empty where ggml can.

    `only_ggml` names a setting by which transformers can not compute here, if there is one.

    Raises ConfigurationError when ggml is asked for and hindered. A lossy one is measured before it is used.
    """
    needs_ggml = asks_for_ggml(wishes) or bool(only_ggml)
    if only_ggml and (wishes.executor == "transformers" or wishes.dtype != "auto"):
        raise ConfigurationError(
            f"{only_ggml}, where ggml alone computes, but transformers or a dtype of its is asked for.",
            cure="Leave NOODLE_EXECUTOR and NOODLE_DTYPE at auto.",
        )
    if needs_ggml and ggml_hindrance:
        asked = "NOODLE_EXECUTOR=ggml" if wishes.executor == "ggml" else f"NOODLE_WEIGHTS={wishes.weights}"
        raise ConfigurationError(f"{only_ggml or asked}, but {ggml_hindrance}")
    found: list[Candidate] = []
    if not needs_ggml:
        wanted = "f32" if wishes.quality == "exact" else FORMAT_BY_DTYPE[dtype]
        # a card's own 16 bits, and what it falls back to when the model bears them badly
        names: tuple[str, ...] = (wanted, "f32") if wishes.dtype == "auto" else (wanted,)
        if wishes.weights != "auto":
            names = (wishes.weights,)
        found += [Candidate("transformers", name, name, DTYPE_BY_FORMAT[name]) for name in dict.fromkeys(names)]
    # who names transformers' dtype, or transformers, wants that and no comparison
    if not ggml_hindrance and wishes.executor != "transformers" and (wishes.dtype == "auto" or needs_ggml):
        names = GGML_WEIGHTS[wishes.quality] if wishes.weights == "auto" else (wishes.weights,)
        if has_gguf and wishes.weights == "auto" and wishes.quality != "exact":
            names = ("gguf", *names)  # what the model was published in: its own bits, whichever these are
        found += [Candidate("ggml", name, "f32" if name == "f32" else "f16", "float32") for name in names]
    return tuple(found)
