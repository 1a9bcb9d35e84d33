"""Matrix products of noodle's kernels, of ggml's, and what the core could do at best, in turn.

`python -m tests.measure kernels [--instructions avx2|avx512] [--only q4_k,q6_k] [--rows 1,64] [--rounds 3]`
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from noodle.model.ggml_types import GGML_TYPES
from services.stage.executors.ggml.backend import CPU, GgmlDevice, load_ggml
from services.stage.executors.ggml.graph import GgmlCalls, GraphMemory
from services.stage.executors.ggml.kernels.library import own_library
from services.stage.executors.ggml.kernels.products import BLOCK_TYPES, FLOAT_TYPES, PackedWeights, packed_weights
from services.stage.executors.ggml.weights import TensorLayout, WeightBlock, own_memory
from tests.measure.kernels.limits import Limits
from tests.measure.kernels.repacked import addresses_of, repacked
from tests.measure.report import Section, spread

SHAPES = ((8192, 3072), (3072, 8192), (3072, 3072))  # outputs and inputs of a 3B model's matrices
ROWS = (1, 2, 4, 8, 16, 64, 512)
READ_ROWS = 16  # up to this many rows the weights are more than the processor's caches hold; beyond, one of each shape
READ_BYTES = 128 << 20
DRAWN_ROWS = 64  # of a weight; quantizing takes long, so they are repeated
ROUNDS = 7


@dataclass(frozen=True)
class Weights:
    """Matrices of one type in ggml's layout and in noodle's."""

    kind: str
    plain: WeightBlock
    packed: WeightBlock
    repacked: list[int] | None  # the same by ggml, for the types that it repacks

    def layouts(self, count: int) -> tuple[TensorLayout, ...]:
        """Return the matrices that are multiplied by this many rows."""
        return self.plain.tensors if count <= READ_ROWS else self.plain.tensors[: len(SHAPES)]


@dataclass
class Rounds:
    """What each round took: seconds of a pass over the weights, and what the loops did meanwhile."""

    plain: list[float] = field(default_factory=list)
    repacked: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    bytes_per_second: list[float] = field(default_factory=list)
    products_per_second: list[float] = field(default_factory=list)


def measure(*, instructions: str = "", only: str = "", rows: str = "", rounds: str = str(ROUNDS)) -> Section:
    """Measure every weight type and row count on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    library, own = load_ggml(), own_library()
    ggml = GgmlCalls(library.module)
    kernels = packed_weights(ggml, only=instructions or None)
    if kernels is None or own is None:
        raise SystemExit("This processor runs none of these kernels of noodle, or they were not built (make setup).")
    used = kernels.instructions
    section = Section(f"kernels --instructions {used}", f"noodle's kernels beside ggml's, {used.upper()}")
    section.is_partial = bool(only or rows) or int(rounds) < ROUNDS
    shapes = ", ".join(f"{outputs} x {inputs}" for outputs, inputs in SHAPES)
    compiled = "AVX512" if library.module.ggml_cpu_has_avx512() else "AVX2"
    section.say(
        f"One core; {shapes} numbers, the matrices of a 3B model, {READ_BYTES >> 20} MB of them up to {READ_ROWS} rows "
        f"and one of each beyond; {rounds} rounds in turn of ggml (compiled with {compiled}), ggml with its repacked "
        "layout where the type has one, noodle, a loop that only reads these weights and one that only multiplies and "
        "adds in registers. Medians of CPU milliseconds for all of them, of ratios to the faster of ggml's two, and of "
        "noodle's shares of both loops' speed; a GMAC is 10^9 multiplications and additions."
    )
    bench = KernelBench(GgmlDevice(ggml, CPU, library.backend(1)), kernels, Limits(own, used), int(rounds))
    kinds = [name for name in FLOAT_TYPES + BLOCK_TYPES if not only or name.lower() in only.lower().split(",")]
    counts = [int(each) for each in rows.split(",")] if rows else ROWS
    heads = ["weights", "rows", "ggml, ms", "repacked, ms", "noodle, ms", "times as fast", "GB/s", "of reading",
             "GMAC/s", "of multiplying"]  # fmt: skip
    print(heads, flush=True)
    section.table(heads, [line for kind in kinds for line in bench.lines(kind, counts)])
    return section


@dataclass(frozen=True)
class KernelBench:
    """Both sides and the loops."""

    device: GgmlDevice
    kernels: PackedWeights
    limits: Limits
    rounds: int

    def lines(self, kind: str, counts: Sequence[int]) -> list[list[object]]:
        """Return the lines of the table for one type of weights."""
        weights = drawn(self.device, self.kernels, kind)
        lines = []
        for count in counts:
            lines.append(line_of(weights, count, self.in_turn(weights, count)))
            print(lines[-1], flush=True)
        return lines

    def in_turn(self, weights: Weights, count: int) -> Rounds:
        """Return what all did in each round but the first, which warms up."""
        graphs = {
            "plain": products(self.device, None, weights, count),
            "ours": products(self.device, self.kernels, weights, count),
        }
        if weights.repacked:
            graphs["repacked"] = products(self.device, None, weights, count, is_repacked=True)
        found = Rounds()
        for _ in range(self.rounds + 1):
            found.bytes_per_second.append(self.limits.bytes_per_second(weights.packed.memory))
            found.products_per_second.append(self.limits.products_per_second(weights.kind))
            for name, graph in graphs.items():
                getattr(found, name).append(seconds_of(graph))
        for graph in graphs.values():
            graph.close()
        return Rounds(*(each[1:] for each in vars(found).values()))


def seconds_of(graph: GraphMemory) -> float:
    """Return the CPU seconds of one computation of a graph: other programs on the core cost nothing."""
    begin = time.process_time()
    graph.compute()
    return time.process_time() - begin


def line_of(weights: Weights, count: int, found: Rounds) -> list[object]:
    """Return one line of the table."""
    layouts = weights.layouts(count)
    byte_count = sum(layout.byte_count for layout in layouts)
    product_count = count * sum(math.prod(layout.sizes) for layout in layouts)
    ours = statistics.median(found.ours)
    theirs = list(map(min, found.plain, found.repacked)) if found.repacked else found.plain
    of_reading = [byte_count / taken / limit for taken, limit in zip(found.ours, found.bytes_per_second, strict=True)]
    of_multiplying = [
        product_count / taken / limit for taken, limit in zip(found.ours, found.products_per_second, strict=True)
    ]
    return [
        weights.kind,
        count,
        f"{statistics.median(found.plain) * 1e3:.2f}",
        f"{statistics.median(found.repacked) * 1e3:.2f}" if found.repacked else "",
        f"{ours * 1e3:.2f}",
        spread([a / b for a, b in zip(theirs, found.ours, strict=True)]),
        f"{byte_count / ours / 1e9:.1f}",
        f"{statistics.median(of_reading):.2f}",
        f"{product_count / ours / 1e9:.0f}",
        f"{statistics.median(of_multiplying):.2f}",
    ]


def drawn(device: GgmlDevice, kernels: PackedWeights, kind: str) -> Weights:
    """Return matrices of a type, as many of each shape as fill the memory."""
    type_ = GGML_TYPES[kind.upper()]
    set_bytes = sum(type_.byte_count(outputs * inputs) for outputs, inputs in SHAPES)
    layouts, offset = [], 0
    for outputs, inputs in SHAPES * math.ceil(READ_BYTES / set_bytes):
        byte_count = type_.byte_count(outputs * inputs)
        layouts.append(TensorLayout("weight", type_.number, (inputs, outputs), offset, byte_count))
        offset += byte_count  # of these shapes always a multiple of 64
    plain, packed = (WeightBlock(tuple(layouts), own_memory(offset)) for _ in range(2))
    random = np.random.default_rng(1)
    quantized = {inputs: quantize(device, kind, random.standard_normal((DRAWN_ROWS, inputs))) for _, inputs in SHAPES}
    for layout in layouts:
        for block in (plain, packed):
            block.bytes_of(layout).reshape(layout.sizes[1] // DRAWN_ROWS, -1)[...] = quantized[layout.sizes[0]]
    for layout in layouts:
        kernels.pack(layout, packed)
    return Weights(kind, plain, packed, repacked(device, plain))


def quantize(device: GgmlDevice, kind: str, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Return numbers in the type's blocks."""
    type_, values = GGML_TYPES[kind.upper()], numbers.astype(np.float32)
    if kind == "F32":
        return values.reshape(-1).view(np.uint8)
    blocks = np.empty(type_.byte_count(values.size), np.uint8)
    addresses = (values.ctypes.data, blocks.ctypes.data)
    device.ggml.ggml_quantize_chunk(type_.number, *addresses, 0, *values.shape, None)
    return blocks


def products(
    device: GgmlDevice, kernels: PackedWeights | None, weights: Weights, count: int, *, is_repacked: bool = False
) -> GraphMemory:
    """Return a graph that multiplies the same rows with each weight, by ggml's kernels if none are given."""
    ggml, layouts = device.ggml, weights.layouts(count)
    graph = GraphMemory(device, 16 + 4 * len(layouts))
    block = weights.packed if kernels else weights.plain
    matrices = weights.repacked if is_repacked else addresses_of(graph, layouts, block)
    rows: dict[int, int] = {}
    tiles: dict[tuple[int, str], int] = {}
    for weight, layout in zip(matrices or (), layouts, strict=False):
        inputs = layout.sizes[0]
        if inputs not in rows:
            rows[inputs] = graph.persist(ggml.ggml_new_tensor_2d(graph.context, ggml.GGML_TYPE_F32, inputs, count))
        if kernels:
            kind = kernels.tiles_of(weight)
            if (inputs, kind) not in tiles:
                tiles[inputs, kind] = kernels.tiles(graph.context, rows[inputs], kind)
            product = kernels.product(graph.context, weight, tiles[inputs, kind])
        else:
            product = ggml.ggml_mul_mat(graph.context, weight, rows[inputs])
        ggml.ggml_build_forward_expand(graph.graph, product)
    graph.allocate()
    random = np.random.default_rng(2)
    for inputs, given in rows.items():
        graph.array(given, (count, inputs), "<f4")[...] = random.standard_normal((count, inputs))
    return graph
