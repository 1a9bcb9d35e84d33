"""Chooses the fastest GEMM layout of linear layers on this CPU, for small batches and for weights packed by oneDNN.

torch passes a step of few tokens to the matrix library as rows times weight. Some libraries are slow at this on some
processors: on an AMD processor two rows took two to four times as long as weight times columns, and one row up to twice
as long as two columns of which one is discarded. And for few rows the library first reorders a weight, which takes two
or three times as long as reading it; a weight packed in that order is only read. Both are measured when a slice is
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import nn

from services.stage.executors.base import least_seconds

MOST_ROWS = 8  # with more rows no other layout was ever faster
SMALLEST_ITEMS = 1 << 18  # of a weight worth measuring
ROUNDS = 2  # of each layout; the fastest one counts
PACKED_ROUNDS = 4  # the same for packed weights, which gain less
TIMED_BYTES = 48 << 20  # of weights of one shape in a row: more than a processor's caches hold
WORTH_CHANGING = 0.85  # share of the seconds by torch's layout
PACKED_ROWS = (1, 2, 4, 8, 32, 128)  # row counts that packed weights are compared for: batches of tokens, and a chunk
WORTH_PACKING = 0.92  # mean share of the seconds without
NOT_SLOWER = 1.08  # share for each row count: two equal times may differ by this
LIKELY_ROWS = 8  # that oneDNN packs a weight for
# the operations themselves: looking them up by name takes longer than a small product
_reorder = getattr(getattr(torch.ops.mkldnn, "_reorder_linear_weight", None), "default", None)
_multiply = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


class GemmLayout(Enum):
    """How a weight [out, in] and rows [n, in] are multiplied."""

    ROWS = "rows times weight"
    COLUMNS = "weight times columns"
    TWO_COLUMNS = "weight times the only column twice"


def multiply(layout: GemmLayout, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] times a weight [out, in]: [n, out]."""
    if layout is GemmLayout.ROWS:
        return nn.functional.linear(rows, weight)
    columns = (torch.cat((rows, rows)) if layout is GemmLayout.TWO_COLUMNS else rows).T
    return (weight @ columns)[:, : len(rows)].T.contiguous()


class SmallBatchLinear(nn.Linear):
    """A linear layer with the fastest layout for each small number of rows; its results are the same."""

    layouts: tuple[GemmLayout, ...]  # by number of rows, from 1 on

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        count = input.numel() // self.in_features
        layout = self.layouts[count - 1] if 0 < count <= len(self.layouts) else GemmLayout.ROWS
        if layout is GemmLayout.ROWS:
            return nn.functional.linear(input, self.weight, self.bias)
        product = multiply(layout, self.weight, input.reshape(count, self.in_features))
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)


class PackedLinear(nn.Linear):
    """A linear layer that holds only oneDNN's packed weight; its results are the same up to rounding."""

    packed: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The plain weight [out, in], unpacked at each access."""
        return self.packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (*input.shape[:-1], self.out_features)
        if not input.numel():
            return input.new_empty(shape)
        return multiply_packed(self.packed, input.reshape(-1, self.in_features), self.bias).view(shape)


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy of a CPU weight [out, in] in oneDNN's order; None if this torch or processor does not support it."""
    if _reorder is None or _multiply is None:
        return None
    try:
        packed: torch.Tensor = _reorder(weight, LIKELY_ROWS)
        multiply_packed(packed, torch.zeros(1, weight.shape[1], dtype=weight.dtype), None)
    except RuntimeError:  # a dtype that this processor cannot multiply packed
        return None
    return packed


def multiply_packed(packed: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows [n, in] times a packed weight [out, in]: [n, out]."""
    product: torch.Tensor = _multiply(rows, packed, bias, "none", [], "")  # type: ignore[misc]
    return product


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as held, shared ones counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(tensors.values()) + sum(tensor.numel() * tensor.itemsize for tensor in packed)


@dataclass(frozen=True, slots=True)
class _Choice:
    """For weights of one kind."""

    layouts: tuple[GemmLayout, ...]  # by number of rows, from 1 on
    packs: bool  # whether packed weights are faster


_Kind = tuple[torch.Size, torch.dtype, int]  # shape and dtype of a weight, and the number of threads
_choices: dict[_Kind, _Choice] = {}  # a stage loads the same shapes again with each plan


def choose_gemm_layouts(model: nn.Module) -> None:
    """Let every linear layer of a model on the CPU multiply in the fastest layout."""
    threads = torch.get_num_threads()
    by_kind: dict[_Kind, list[nn.Linear]] = {}
    for module in model.modules():
        if type(module) is not nn.Linear:  # a subclass may compute differently
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.numel() >= SMALLEST_ITEMS:
            by_kind.setdefault((weight.shape, weight.dtype, threads), []).append(module)
    for kind, modules in by_kind.items():
        if kind not in _choices:
            layouts = fastest_layouts(modules[0].weight)
            _choices[kind] = _Choice(layouts, is_faster_packed(modules[0].weight, layouts))
        for module in modules:
            packed = pack(module.weight) if _choices[kind].packs else None
            if packed is not None:
                del module.weight  # nothing else holds the plain weight then
                module.__class__ = PackedLinear
                module.__dict__["packed"] = packed
            else:
                module.__class__ = SmallBatchLinear
                module.__dict__["layouts"] = _choices[kind].layouts


def fastest_layouts(weight: torch.Tensor) -> tuple[GemmLayout, ...]:
    """The fastest layout for 1 to MOST_ROWS rows, with weights like this one read from memory and not from a cache."""
    weights = _timed_weights(weight)
    with torch.inference_mode():
        return tuple(_fastest_layout(weights, rows) for rows in range(1, MOST_ROWS + 1))


def is_faster_packed(weight: torch.Tensor, layouts: Sequence[GemmLayout]) -> bool:
    """Whether weights like this one are multiplied faster when packed, for every number of rows."""
    weights = _timed_weights(weight)
    with torch.inference_mode():
        copies = [copy for each in weights if (copy := pack(each)) is not None]
        if len(copies) < len(weights):
            return False
        shares = []
        for count in PACKED_ROWS:
            rows = torch.ones(count, weights.shape[2], dtype=weights.dtype)
            layout = layouts[count - 1] if count <= len(layouts) else GemmLayout.ROWS
            runs = [
                partial(_multiply_all, weights, partial(multiply, layout, rows=rows)),
                partial(_multiply_all, copies, partial(multiply_packed, rows=rows, bias=None)),
            ]
            plain, packed = least_seconds(runs, PACKED_ROUNDS)
            shares.append(packed / plain)
    return max(shares) <= NOT_SLOWER and math.prod(shares) ** (1 / len(shares)) < WORTH_PACKING


def _timed_weights(weight: torch.Tensor) -> torch.Tensor:
    """[count, out, in] of weights like this one, more than a processor's caches hold."""
    if weight.nbytes >= TIMED_BYTES:
        return weight[None, : TIMED_BYTES // weight[0].nbytes]
    # one allocation, which is returned to the system as a whole
    return torch.ones(-(-TIMED_BYTES // weight.nbytes), *weight.shape, dtype=weight.dtype)


def _multiply_all(weights: Iterable[torch.Tensor], product: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for weight in weights:
        product(weight)


def _fastest_layout(weights: torch.Tensor, count: int) -> GemmLayout:
    rows = torch.ones(count, weights.shape[2], dtype=weights.dtype)
    other = GemmLayout.TWO_COLUMNS if count == 1 else GemmLayout.COLUMNS
    runs = [
        partial(_multiply_all, weights, partial(multiply, layout, rows=rows)) for layout in (GemmLayout.ROWS, other)
    ]
    seconds = least_seconds(runs, ROUNDS)
    return other if seconds[1] < WORTH_CHANGING * seconds[0] else GemmLayout.ROWS
