"""Which numbers of rows ggml multiplies faster as if for a lone expert, measured; knows weights and types, no layers.

ggml has two kernels for a weight and several rows: one that computes tiles of the product, made for prompts, and one
that takes dot products, which it uses for experts. On an AMD processor tiles of two rows took twice as long as dot
products, and of four rows in 8 bits a quarter more; of sixteen rows two thirds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.stage.executors.ggml.device import GgmlDevice
from services.stage.executors.ggml.graph import GraphMemory
from services.stage.executors.least_seconds import least_seconds

MOST_ROWS = 8  # of more, tiles were always faster
ROUNDS = 3  # of each way, of which the fastest counts
SMALLEST_ITEMS = 1 << 18  # of a weight that is worth a look
TIMED_BYTES = 48 << 20  # of weights of one type, one behind the other: more than a processor's caches hold
WORTH_CHANGING = 0.9  # of the seconds by tiles

DotCounts = Mapping[int, frozenset[int]]  # by type of weights: the numbers of rows that dot products are faster for


def dot_counts(device: GgmlDevice, weights: Sequence[int]) -> DotCounts:
    """For the types of these weights, matrices of a slice whose memory is there; on the device's threads."""
    ggml = device.ggml
    by_type: dict[int, list[int]] = {}
    bytes_of_type: dict[int, int] = {}
    for weight in weights:
        tensor = ggml.ggml_tensor.from_address(weight)
        kind, columns, rows, others = int(tensor.type), *map(int, tensor.ne[:3])
        is_worth_it = others == 1 and columns * rows >= SMALLEST_ITEMS
        if is_worth_it and bytes_of_type.get(kind, 0) < TIMED_BYTES:
            by_type.setdefault(kind, []).append(weight)
            bytes_of_type[kind] = bytes_of_type.get(kind, 0) + int(ggml.ggml_nbytes(weight))
    return {
        kind: frozenset(count for count in range(2, MOST_ROWS + 1) if _dots_are_faster(device, chosen, count))
        for kind, chosen in by_type.items()
    }


def product_by_dots(ggml: Any, context: Any, weight: int, rows: int, lone_expert: int) -> int:
    """rows [features, count] times a weight, like mul_mat; `lone_expert` [1, count] chooses expert 0 for each row."""
    features, count = ggml.ggml_tensor.from_address(rows).ne[:2]
    each = ggml.ggml_reshape_3d(context, rows, features, 1, count)
    product = ggml.ggml_mul_mat_id(context, weight, each, lone_expert)
    return int(ggml.ggml_reshape_2d(context, product, ggml.ggml_tensor.from_address(product).ne[0], count))


def new_lone_expert(memory: GraphMemory, count: int) -> int:
    """The choice of the one expert for each row: to be zeroed when the graph has its memory."""
    chosen = int(memory.ggml.ggml_new_tensor_2d(memory.context, memory.ggml.GGML_TYPE_I32, 1, count))
    memory.ggml.ggml_set_input(chosen)
    memory.ggml.ggml_set_output(chosen)  # its memory is given to nothing else
    return chosen


def zero_lone_expert(memory: GraphMemory, lone_expert: int, count: int) -> None:
    """Write the choice into a graph that has its memory; `lone_expert` is 0 where it needs none."""
    if lone_expert:
        memory.array(lone_expert, (count,), "<i4")[...] = 0


def _dots_are_faster(device: GgmlDevice, weights: Sequence[int], count: int) -> bool:
    graphs = [_products(device, weights, count, by_dots) for by_dots in (False, True)]
    try:
        seconds = least_seconds([memory.compute for memory in graphs], ROUNDS)
    finally:
        for memory in graphs:
            memory.close()
    return seconds[1] < WORTH_CHANGING * seconds[0]


def _products(device: GgmlDevice, weights: Sequence[int], count: int, by_dots: bool) -> GraphMemory:
    ggml = device.ggml
    memory = GraphMemory(device, 16 + 6 * len(weights))
    lone_expert = new_lone_expert(memory, count)
    rows_by_features: dict[int, int] = {}
    for weight in weights:
        features = int(ggml.ggml_tensor.from_address(weight).ne[0])
        if features not in rows_by_features:
            rows = rows_by_features[features] = int(
                ggml.ggml_new_tensor_2d(memory.context, ggml.GGML_TYPE_F32, features, count)
            )
            ggml.ggml_set_input(rows)
            ggml.ggml_set_output(rows)
        rows = rows_by_features[features]
        product = (
            product_by_dots(ggml, memory.context, weight, rows, lone_expert)
            if by_dots
            else ggml.ggml_mul_mat(memory.context, weight, rows)
        )
        ggml.ggml_build_forward_expand(memory.graph, product)
    for tensor in (lone_expert, *rows_by_features.values()):
        ggml.ggml_build_forward_expand(memory.graph, tensor)
    memory.allocate()
    zero_lone_expert(memory, lone_expert, count)
    for features, rows in rows_by_features.items():
        memory.array(rows, (count, features), "<f4")[...] = np.float32(0.5)
    return memory
