"""Chooses how a stage computes its layers: by ggml with the file's own weights, unless a setting says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from noodle.errors import ConfigurationError, TransformersUnavailable
from noodle.installation import has_transformers, transformers_cure
from noodle.model.formats import DTYPE_BY_FORMAT, FORMAT_BY_DTYPE, STORED
from services.stage.executors.candidate import Candidate


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """NOODLE_EXECUTOR, _WEIGHTS, _QUALITY, _DTYPE and _KV, which noodle.config has checked against one another."""

    executor: str = "auto"
    weights: str = "auto"
    quality: str = STORED
    dtype: str = "auto"
    kv_format: str = "auto"

    @property
    def asks_for_ggml(self) -> bool:
        """Whether the executor, or a format of weights or KV rows that only ggml has, is named."""
        only_ggml = self.weights not in ("auto", STORED, *DTYPE_BY_FORMAT) or self.kv_format != "auto"
        return self.executor == "ggml" or only_ggml

    @property
    def asking_for_ggml(self) -> str:
        """The setting that asks for ggml, in words."""
        if self.executor == "ggml":
            return "NOODLE_EXECUTOR=ggml"
        return f"NOODLE_KV={self.kv_format}" if self.kv_format != "auto" else f"NOODLE_WEIGHTS={self.weights}"

    @property
    def asks_for_transformers(self) -> bool:
        """Whether the executor, or a number format that only transformers computes in, is named."""
        return self.executor == "transformers" or (self.dtype != "auto" and not self.asks_for_ggml)

    @property
    def is_exact(self) -> bool:
        return self.quality == "exact"


def choose_executor(options: ExecutorOptions, ggml_hindrance: str, *, only_ggml: str = "") -> tuple[str, str]:
    """The executor, and the reason in words.

    `ggml_hindrance` is empty if ggml can compute this model here; `only_ggml` is a setting or a kind of file that
    transformers cannot compute, in words. Raises ConfigurationError if what is requested cannot compute, and
    TransformersUnavailable if only transformers could, and is not installed.
    """
    needs_ggml = options.asks_for_ggml or bool(only_ggml)
    if only_ggml and options.asks_for_transformers:
        raise ConfigurationError(
            f"{only_ggml}, where ggml alone computes, but transformers or one of its dtypes is requested.",
            cure="Leave NOODLE_EXECUTOR and NOODLE_DTYPE at auto.",
        )
    if needs_ggml:
        if ggml_hindrance:
            raise ConfigurationError(f"{only_ggml or options.asking_for_ggml}, but {ggml_hindrance}")
        return "ggml", "configured" if options.asks_for_ggml else only_ggml
    if options.asks_for_transformers:
        if not has_transformers():
            is_named = options.executor == "transformers"
            named = "NOODLE_EXECUTOR=transformers" if is_named else f"NOODLE_DTYPE={options.dtype}"
            raise TransformersUnavailable(f"{named}, but transformers is not installed here.", cure=transformers_cure())
        return "transformers", "configured"
    if not ggml_hindrance:
        return "ggml", "it computes this model"
    if not has_transformers():
        raise TransformersUnavailable(
            f"Nothing that is installed here computes this model: {ggml_hindrance}", cure=transformers_cure()
        )
    return "transformers", f"no ggml: {ggml_hindrance}"


def candidate_of(executor: str, options: ExecutorOptions, transformers_dtype: str) -> Candidate:
    """Formats of weights and KV rows, and the dtype of hidden states.

    The weights are the file's own, unless a format is named or quality is exact. `transformers_dtype` is what
    transformers computes in here: float32, float16 or bfloat16.
    """
    if executor == "transformers":
        named = options.weights if options.weights in DTYPE_BY_FORMAT else FORMAT_BY_DTYPE[transformers_dtype]
        name = "f32" if options.is_exact else named
        return Candidate("transformers", name, name, DTYPE_BY_FORMAT[name])
    if options.is_exact:
        return Candidate("ggml", "f32", "f32", "float32")
    kv_format = "f16" if options.kv_format == "auto" else options.kv_format
    return Candidate("ggml", STORED if options.weights == "auto" else options.weights, kv_format, "float32")
