"""Chooses how a stage computes its layers: the fastest candidate of sufficient quality, by measurement alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from noodle.errors import ConfigurationError, UnsupportedModel
from noodle.model.formats import DTYPE_BY_FORMAT, FORMAT_BY_DTYPE, Quality, why_refused
from services.stage.executors.candidate import Candidate
from services.stage.selection.benchmark import MeasuredSeconds

# Formats that are compared by default. Both 16-bit formats are included: the measurement shows which one a processor
# supports natively. q4_K needs rows of a multiple of 256 numbers, which many small models lack: it must be named.
GGML_WEIGHTS = {
    "exact": ("f32",),
    "near-lossless": ("q8_0", "f16", "bf16", "f32"),
    "small": ("q4_0", "q8_0", "f16", "bf16", "f32"),
}
# Candidates are compared by a request with as many prompt tokens as new ones. A prompt's tokens are computed together,
# so they weigh little unless they are slow.
PROMPT_TOKENS_PER_NEW_TOKEN = 1.0
FEWER_THREADS_SHARE = 0.95  # fewer threads are chosen below this share of the seconds of all threads


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """NOODLE_EXECUTOR, _WEIGHTS, _QUALITY and _DTYPE, which noodle.config has checked against one another."""

    executor: str = "auto"
    weights: str = "auto"
    quality: str = "near-lossless"
    dtype: str = "auto"

    @property
    def asks_for_ggml(self) -> bool:
        """Whether the executor, or weights that only ggml has, is named."""
        return self.executor == "ggml" or self.weights not in ("auto", *DTYPE_BY_FORMAT)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen candidate with its speed, quality and the reason in words."""

    candidate: Candidate
    seconds: MeasuredSeconds
    quality: Quality | None  # None if the candidate is lossless, or its quality cannot be measured
    reason: str


def candidates(
    options: ExecutorOptions, dtype: str, ggml_hindrance: str, *, has_gguf: bool = False, only_ggml: str = ""
) -> tuple[Candidate, ...]:
    """All candidates to compare.

    `dtype` is what transformers would use here; `ggml_hindrance` is empty if ggml can compute; `only_ggml` names a
    setting with which transformers cannot compute, if there is one. Raises ConfigurationError if ggml is requested and
    hindered.
    """
    needs_ggml = options.asks_for_ggml or bool(only_ggml)
    if only_ggml and (options.executor == "transformers" or options.dtype != "auto"):
        raise ConfigurationError(
            f"{only_ggml}, where ggml alone computes, but transformers or one of its dtypes is requested.",
            cure="Leave NOODLE_EXECUTOR and NOODLE_DTYPE at auto.",
        )
    if needs_ggml and ggml_hindrance:
        named = "NOODLE_EXECUTOR=ggml" if options.executor == "ggml" else f"NOODLE_WEIGHTS={options.weights}"
        raise ConfigurationError(f"{only_ggml or named}, but {ggml_hindrance}")
    found: list[Candidate] = []
    if not needs_ggml:
        wanted = "f32" if options.quality == "exact" else FORMAT_BY_DTYPE[dtype]
        # a card's native 16 bits, and the fallback if they harm the model
        names: tuple[str, ...] = (wanted, "f32") if options.dtype == "auto" else (wanted,)
        if options.weights != "auto":
            names = (options.weights,)
        found += [Candidate("transformers", name, name, DTYPE_BY_FORMAT[name]) for name in dict.fromkeys(names)]
    # a named transformers or dtype of it is not compared with ggml
    if not ggml_hindrance and options.executor != "transformers" and (options.dtype == "auto" or needs_ggml):
        names = GGML_WEIGHTS[options.quality] if options.weights == "auto" else (options.weights,)
        if has_gguf and options.weights == "auto" and options.quality != "exact":
            names = ("gguf", *names)  # the bits that the model was published in
        found += [Candidate("ggml", name, "f32" if name == "f32" else "f16", "float32") for name in names]
    return tuple(found)


def choose(
    compared: Sequence[Candidate],
    wanted_quality: str,
    measure: Callable[[Candidate], MeasuredSeconds],
    quality_of: Callable[[Candidate, MeasuredSeconds], Quality],
) -> Chosen:
    """Time all candidates, then check the quality of the fastest ones until one is allowed.

    `quality_of` may raise UnsupportedModel if the quality cannot be measured; such a candidate is used only if it is
    the only one. Raises ConfigurationError if none is left, with the reason for each.
    """
    timed = sorted(((measure(candidate), candidate) for candidate in compared), key=lambda each: cost(each[0]))
    times = ", ".join(f"{candidate} {_times(seconds)}" for seconds, candidate in timed)
    refused: list[str] = []
    for seconds, candidate in timed:
        quality, why = None, ""
        if not candidate.is_lossless:
            try:
                quality = quality_of(candidate, seconds)
                why = why_refused(quality, wanted_quality)
            except UnsupportedModel as error:
                why = "" if len(compared) == 1 else f"its quality is unknown: {error.message}"
        if why:
            refused.append(f"{candidate} is refused ({why})")
            continue
        described = []
        if quality is not None:
            agreement = f"{quality.greedy_agreement:.1%} of greedy tokens agree"
            described.append(f"perplexity times {quality.perplexity_ratio:.4f}, {agreement}")
        reason = "; ".join([f"{candidate}, of a new and a prompt token: {times}", *described, *refused])
        return Chosen(candidate, seconds, quality, reason)
    raise ConfigurationError(
        f"No allowed way to compute this model is left here: {'; '.join(refused)}.",
        cure="Allow more (NOODLE_QUALITY=small), or leave NOODLE_WEIGHTS and NOODLE_DTYPE at auto.",
    )


def choose_threads(
    chosen: Chosen, threads: int, measure: Callable[[Candidate, int], MeasuredSeconds]
) -> tuple[int, Chosen]:
    """Use half the threads if they are faster: two threads that share a core may slow each other down.

    Returns the number of threads, and the choice with their seconds.
    """
    half = threads // 2
    if half < 1:
        return threads, chosen
    seconds = measure(chosen.candidate, half)
    if cost(seconds) >= FEWER_THREADS_SHARE * cost(chosen.seconds):
        return threads, chosen
    reason = f"{chosen.reason}; {half} threads take {_times(seconds)}, {threads} take longer"
    return half, replace(chosen, seconds=seconds, reason=reason)


def cost(seconds: MeasuredSeconds) -> float:
    """Seconds of a layer for one new token and its share of the prompt."""
    return seconds.decode_layer_seconds + PROMPT_TOKENS_PER_NEW_TOKEN * seconds.prefill_layer_seconds_per_token


def _times(seconds: MeasuredSeconds) -> str:
    decode, prefill = seconds.decode_layer_seconds * 1e3, seconds.prefill_layer_seconds_per_token * 1e3
    return f"{decode:.2f} and {prefill:.3f} ms a layer"
