"""One way to compute a model's layers."""

from __future__ import annotations

from dataclasses import dataclass

from noodle.model.formats import is_lossless


@dataclass(frozen=True, slots=True)
class Candidate:
    """An executor, its formats of weights and KV rows, and the dtype of hidden states."""

    executor: str
    weights: str
    kv_dtype: str
    dtype: str

    @property
    def is_lossless(self) -> bool:
        """Whether its results are those of float32."""
        return is_lossless(self.weights, self.kv_dtype)

    def __str__(self) -> str:
        return f"{self.executor} {self.weights}"
