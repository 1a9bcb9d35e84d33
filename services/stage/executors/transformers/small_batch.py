"""Products of a weight and a few rows on a CPU, each number of rows in the way that is fastest here.

Torch hands a step of few tokens to the matrix library as rows times weight. Some libraries are slow at that on some
processors: on an AMD one, two rows took two to four times as long as weight times columns, and one row up to twice as
long as two columns of which one is thrown away. Which way is fastest is measured when a slice is loaded, and
whether a weight is better kept in the library's own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import nn

from services.stage.executors.least_seconds import least_seconds
from services.stage.executors.transformers.linear import PackedLinear, multiply_packed, pack

MOST_ROWS = 8  # of more, no other way was ever faster
SMALLEST_ITEMS = 1 << 18  # of a weight that is worth a look
ROUNDS = 2  # of each way, of which the fastest counts
PACKED_ROUNDS = 4  # the same, where less may be won
TIMED_BYTES = 48 << 20  # of weights of one shape, one behind the other: more than a processor's caches hold
WORTH_CHANGING = 0.85  # of the seconds as torch does it
PACKED_ROWS = (1, 2, 4, 8, 32, 128)  # for which a packed weight is compared: tokens, batches of them, and a chunk
WORTH_PACKING = 0.92  # of the seconds without, in the mean
NOT_SLOWER = 1.08  # and at most this for any of them: as much as two equal times may differ


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


@dataclass(frozen=True, slots=True)
class Known:
    """Of weights that are alike."""

    ways: tuple[Way, ...]  # by number of rows from 1 on
    packs: bool  # whether they are better kept in oneDNN's order


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
            ways = fastest_ways(modules[0].weight)
            _known[kind] = Known(ways, is_faster_packed(modules[0].weight, ways))
        for module in modules:
            packed = pack(module.weight) if _known[kind].packs else None
            if packed is not None:
                PackedLinear.take_over(module, packed)
            else:
                module.__class__ = FewRowsLinear
                module.__dict__["ways"] = _known[kind].ways


def fastest_ways(weight: torch.Tensor) -> tuple[Way, ...]:
    """For each number of rows from 1 to MOST_ROWS, with weights like this one that come from memory and no cache."""
    weights = _timed_weights(weight)
    with torch.inference_mode():
        return tuple(_fastest_way(weights, rows) for rows in range(1, MOST_ROWS + 1))


def is_faster_packed(weight: torch.Tensor, ways: Sequence[Way]) -> bool:
    """Whether weights like this one are multiplied faster in oneDNN's order, for whatever number of rows."""
    weights = _timed_weights(weight)
    with torch.inference_mode():
        copies = [copy for each in weights if (copy := pack(each)) is not None]
        if len(copies) < len(weights):
            return False
        shares = []
        for count in PACKED_ROWS:
            rows = torch.ones(count, weights.shape[2], dtype=weights.dtype)
            way = ways[count - 1] if count <= len(ways) else Way.ROWS
            as_is, packed = least_seconds(
                [partial(_multiply_all, weights, rows, way), partial(_multiply_all_packed, copies, rows)], PACKED_ROUNDS
            )
            shares.append(packed / as_is)
    return max(shares) <= NOT_SLOWER and math.prod(shares) ** (1 / len(shares)) < WORTH_PACKING


def _timed_weights(weight: torch.Tensor) -> torch.Tensor:
    """[count, out, in] of weights like this one, more than a processor's caches hold."""
    if weight.nbytes >= TIMED_BYTES:
        return weight[None, : TIMED_BYTES // weight[0].nbytes]
    # one block, which goes back to the system as a whole
    return torch.ones(-(-TIMED_BYTES // weight.nbytes), *weight.shape, dtype=weight.dtype)


def _multiply_all(weights: torch.Tensor, rows: torch.Tensor, way: Way) -> None:
    for weight in weights:
        multiplied(way, weight, rows)


def _multiply_all_packed(weights: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
    for weight in weights:
        multiply_packed(weight, rows, None)


def _fastest_way(weights: torch.Tensor, count: int) -> Way:
    rows = torch.ones(count, weights.shape[2], dtype=weights.dtype)
    other = Way.TWO_COLUMNS if count == 1 else Way.COLUMNS
    seconds = least_seconds([partial(_multiply_all, weights, rows, way) for way in (Way.ROWS, other)], ROUNDS)
    return other if seconds[1] < WORTH_CHANGING * seconds[0] else Way.ROWS


_Kind = tuple[torch.Size, torch.dtype, int]  # of weights that are alike: shape, type, and by how many threads
_known: dict[_Kind, Known] = {}  # a stage loads the same shapes again with each plan
