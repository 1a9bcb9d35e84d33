"""Products of a weight and a few rows on a CPU, each number of rows in the way that is fastest here.

Torch hands a step of few tokens to the matrix library as rows times weight. Some libraries are slow at that on some
processors: on an AMD one, two rows took two to four times as long as weight times columns, and one row up to twice as
long as two columns of which one is thrown away. Which way is fastest is measured when a slice is loaded.
"""

from __future__ import annotations

from enum import Enum
from functools import partial

import torch
from torch import nn

from services.stage.least_seconds import least_seconds

MOST_ROWS = 8  # of more, no other way was ever faster
SMALLEST_ITEMS = 1 << 18  # of a weight that is worth a look
ROUNDS = 2  # of each way, of which the fastest counts
TIMED_BYTES = 48 << 20  # of weights of one shape, one behind the other: more than a processor's caches hold
WORTH_CHANGING = 0.85  # of the seconds as torch does it


class Way(Enum):
    """How a weight [out, in] and rows [n, in] are multiplied."""

    ROWS = "rows times weight"
    COLUMNS = "weight times columns"
    TWO_COLUMNS = "weight times the one column twice"


def multiplied(way: Way, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] times a weight [out, in]: [n, out]."""
    if way is Way.ROWS:
        return nn.functional.linear(rows, weight)
    columns = (torch.cat((rows, rows)) if way is Way.TWO_COLUMNS else rows).T
    return (weight @ columns)[:, : len(rows)].T.contiguous()


class FewRowsLinear(nn.Linear):
    """A linear layer that knows which way is fastest for each small number of rows; what it computes is the same."""

    ways: tuple[Way, ...]  # by number of rows from 1 on

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear."""
        count = input.numel() // self.in_features
        way = self.ways[count - 1] if 0 < count <= len(self.ways) else Way.ROWS
        if way is Way.ROWS:
            return nn.functional.linear(input, self.weight, self.bias)
        product = multiplied(way, self.weight, input.reshape(count, self.in_features))
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)


def choose_ways(model: nn.Module) -> None:
    """Let every linear layer of a model on the CPU multiply few rows in the fastest way."""
    threads = torch.get_num_threads()
    by_kind: dict[_Kind, list[nn.Linear]] = {}
    for module in model.modules():
        if type(module) is not nn.Linear:  # another class may compute otherwise
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.numel() >= SMALLEST_ITEMS:
            by_kind.setdefault((weight.shape, weight.dtype, threads), []).append(module)
    for kind, modules in by_kind.items():
        if kind not in _known:
            _known[kind] = fastest_ways(modules[0].weight)
        for module in modules:
            module.__class__ = FewRowsLinear
            module.__dict__["ways"] = _known[kind]


def fastest_ways(weight: torch.Tensor) -> tuple[Way, ...]:
    """For each number of rows from 1 to MOST_ROWS, with weights like this one that come from memory and no cache."""
    if weight.nbytes >= TIMED_BYTES:
        weights = weight[None, : TIMED_BYTES // weight[0].nbytes]
    else:  # one block, which goes back to the system as a whole
        weights = torch.ones(-(-TIMED_BYTES // weight.nbytes), *weight.shape, dtype=weight.dtype)
    with torch.inference_mode():
        return tuple(_fastest_way(weights, rows) for rows in range(1, MOST_ROWS + 1))


def _fastest_way(weights: torch.Tensor, count: int) -> Way:
    rows = torch.ones(count, weights.shape[2], dtype=weights.dtype)
    other = Way.TWO_COLUMNS if count == 1 else Way.COLUMNS

    def multiply_all(way: Way) -> None:
        for weight in weights:
            multiplied(way, weight, rows)

    seconds = least_seconds([partial(multiply_all, Way.ROWS), partial(multiply_all, other)], ROUNDS)
    return other if seconds[1] < WORTH_CHANGING * seconds[0] else Way.ROWS


_Kind = tuple[torch.Size, torch.dtype, int]  # of weights that are alike: shape, type, and by how many threads
_known: dict[_Kind, tuple[Way, ...]] = {}  # a stage loads the same shapes again with each plan
