"""One way to compute a model's layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An executor, its formats of weights and KV rows, and the dtype of hidden states."""

    executor: str
    weights: str
    kv_dtype: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.executor} {self.weights}"
