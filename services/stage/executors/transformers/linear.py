"""A linear layer whose weight is kept in oneDNN's own order; knows the two torch operations for that, no models.

For a product of few rows the matrix library puts a weight into another order first, which takes as long as reading it
two or three times. One that is kept in that order is only read.
"""

from __future__ import annotations

import torch
from torch import nn

LIKELY_ROWS = 8  # of a product: what the order is best for
# the very operations: to find them by their names takes longer than a small product
_reorder = getattr(getattr(torch.ops.mkldnn, "_reorder_linear_weight", None), "default", None)
_multiply = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy of a weight [out, in] on the CPU in oneDNN's order; None where this torch or processor has none for it."""
    if _reorder is None or _multiply is None:
        return None
    try:
        packed: torch.Tensor = _reorder(weight, LIKELY_ROWS)
        multiply_packed(packed, torch.zeros(1, weight.shape[1], dtype=weight.dtype), None)
    except RuntimeError:  # of a dtype that this processor can not multiply so
        return None
    return packed


def multiply_packed(packed: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows [n, in] times a packed weight [out, in]: [n, out]."""
    product: torch.Tensor = _multiply(rows, packed, bias, "none", [], "")  # type: ignore[misc]
    return product


class PackedLinear(nn.Linear):
    """As nn.Linear, up to rounding. The plain weight is made anew for whoever asks for it: nothing else holds it."""

    packed: torch.Tensor

    @classmethod
    def take_over(cls, module: nn.Linear, packed: torch.Tensor) -> None:
        """Let a linear layer multiply with this copy of its weight, and let go of its own."""
        del module.weight
        module.__class__ = cls
        module.__dict__["packed"] = packed

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[out, in]."""
        return self.packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear."""
        shape = (*input.shape[:-1], self.out_features)
        if not input.numel():
            return input.new_empty(shape)
        return multiply_packed(self.packed, input.reshape(-1, self.in_features), self.bias).view(shape)


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers as they are held, what is shared counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(tensors.values()) + sum(tensor.numel() * tensor.itemsize for tensor in packed)
