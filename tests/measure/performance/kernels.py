"""Matrix products of noodle's kernels compared with ggml's, one graph each, in turn."""

from __future__ import annotations

import os
import statistics
import time
import weakref

import numpy as np

from services.stage.executors.ggml.backend import CPU, GgmlDevice, load_ggml
from services.stage.executors.ggml.graph import GgmlCalls, GraphMemory
from services.stage.executors.ggml.kernels.products import PackedWeights, packed_weights
from services.stage.executors.ggml.weights import TYPE_NUMBERS, TensorLayout, WeightBlock, own_memory
from tests.measure.report import Section, spread

TYPES = ("f32", "f16", "bf16", "q8_0")
SHAPE = (1536, 576)  # of the default model's feed-forward
ROWS = (1, 2, 4, 8, 64, 256)
WEIGHTS_BYTES = 94 << 20  # contiguous, more than the processor's caches hold
ROUNDS = 7


def measure() -> Section:
    """Measure every weight type and row count on one core."""
    section = Section("kernels", "noodle's own kernels beside ggml's")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    library = load_ggml()
    ggml = GgmlCalls(library.module)
    kernels = packed_weights(ggml)
    if kernels is None:
        raise SystemExit("This processor runs none of noodle's own kernels, or they were not built (make setup).")
    device = GgmlDevice(ggml, CPU, library.backend(1))
    section.say(
        f"One core, weights of {SHAPE[0]} x {SHAPE[1]} numbers, {WEIGHTS_BYTES >> 20} MB of them one behind the other; "
        f"{ROUNDS} rounds in turn. Milliseconds for all of them, medians; GFLOP/s and GB/s of weights by noodle's."
    )
    kinds = [kind for kind in TYPES if kind in kernels.instructions]
    rows = [compare(device, kernels, kind, count) for kind in kinds for count in ROWS]
    section.table(["weights", "rows", "ggml, ms", "noodle, ms", "times as fast", "GFLOP/s", "GB/s"], rows)
    return section


def compare(device: GgmlDevice, kernels: PackedWeights, kind: str, count: int) -> list[object]:
    """Return one row of the table."""
    outputs, length = SHAPE
    row_bytes = int(device.ggml.ggml_row_size(TYPE_NUMBERS[kind], length))
    copies = WEIGHTS_BYTES // (row_bytes * outputs)
    graphs = [products(device, each, kind, count, copies) for each in (None, kernels)]
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for graph, taken in zip(graphs, seconds, strict=True):
            begin = time.perf_counter()
            graph.compute()
            taken.append(time.perf_counter() - begin)
    for graph in graphs:
        graph.close()
    theirs, ours = (taken[1:] for taken in seconds)  # the first one warms up
    median = statistics.median(ours)
    return [
        kind,
        count,
        f"{statistics.median(theirs) * 1e3:.2f}",
        f"{median * 1e3:.2f}",
        spread([a / b for a, b in zip(theirs, ours, strict=True)]),
        f"{2e-9 * outputs * length * copies * count / median:.0f}",
        f"{1e-9 * row_bytes * outputs * copies / median:.1f}",
    ]


def products(device: GgmlDevice, kernels: PackedWeights | None, kind: str, count: int, copies: int) -> GraphMemory:
    """Return a graph that multiplies the same rows with each of many weights."""
    ggml, (outputs, length) = device.ggml, SHAPE
    number = TYPE_NUMBERS[kind]
    byte_count = int(ggml.ggml_row_size(number, length)) * outputs
    random = np.random.default_rng(1)
    values = random.standard_normal((outputs, length)).astype(np.float32)
    weights = own_memory(byte_count * copies)
    graph = GraphMemory(device, 16 + 4 * copies)
    given = ggml.ggml_new_tensor_2d(graph.context, ggml.GGML_TYPE_F32, length, count)
    ggml.ggml_set_input(given)
    ggml.ggml_set_output(given)
    tiles = 0
    for copy in range(copies):
        memory = weights[copy * byte_count : (copy + 1) * byte_count]
        if kind == "f32":
            memory[:] = values.reshape(-1).view(np.uint8)
        else:
            ggml.ggml_quantize_chunk(number, values.ctypes.data, memory.ctypes.data, 0, outputs, length, None)
        weight = graph.outside(ggml.ggml_new_tensor_2d(graph.context, number, length, outputs))
        graph.words[graph.word(weight) + graph.at_data] = memory.ctypes.data
        if kernels is None:
            product = ggml.ggml_mul_mat(graph.context, weight, given)
        else:
            kernels.pack(
                {"0": WeightBlock((TensorLayout("weight", number, (length, outputs), 0, byte_count),), memory)},
                also_embedding=False,
            )
            tiles = tiles or kernels.tiles(graph.context, given, kernels.tiles_of(weight))
            product = kernels.product(graph.context, weight, tiles)
        ggml.ggml_build_forward_expand(graph.graph, product)
    graph.allocate()
    graph.input(given, (count, length), "<f4")[...] = random.standard_normal((count, length))
    weakref.finalize(graph, len, weights)  # keep the weights alive as long as the graph
    return graph
