"""noodle's own C kernels (`kernels/`) in ggml's graphs, and the fastest GEMM layout for small batches.

The kernels are one library, built beside ggml's libraries if a compiler is installed. Without it, or on a processor
that lacks the instructions, ggml's own kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from noodle.errors import GgmlUnavailable
from noodle.folders import write_atomically
from services.stage.executors.base import least_seconds
from services.stage.executors.ggml.backend import GgmlDevice, folder_of_libraries
from services.stage.executors.ggml.graph import CustomOperations, GgmlCalls, GraphMemory
from services.stage.executors.ggml.weights import TYPE_NUMBERS, TensorLayout, WeightBlock

log = logging.getLogger(__name__)

LIBRARY_NAME = "libnoodle.so"
# names of instructions, and the library's question for each (noodle_has_*); later ones are faster
FLOATS = {"avx2": "avx2", "avx512": "avx512_floats"}

MAX_HEAD_DIM = 256
# by ggml's number of the type of K and V: the head dimension must be a multiple of this
HEAD_DIM_MULTIPLES = {TYPE_NUMBERS["f32"]: 1, TYPE_NUMBERS["f16"]: 16, TYPE_NUMBERS["q8_0"]: 32}

GROUP_ROWS = 16  # weight rows that are interleaved
BLOCK_ITEMS = 32  # of Q8_0
UNIT_ITEMS = {"f32": 1, "f16": 1, "bf16": 2, "q8_0": BLOCK_ITEMS}  # elements of a row that stay together
UNIT_BYTES = {"f32": 4, "f16": 2, "bf16": 4, "q8_0": 0}  # 0 means blocks
TILES = {"f32": "arrange", "f16": "arrange", "bf16": "arrange_bf16", "q8_0": "quantise"}
TILE_BLOCK_BYTES = {"avx2": 72, "avx512": 40}  # of Q8_0 activations: elements, scale and correction
# instructions by the type of the weights, as FLOATS
INSTRUCTIONS = {
    "f32": FLOATS,
    "f16": FLOATS,
    "bf16": {"avx512": "avx512_bf16"},
    "q8_0": {"avx2": "avx2", "avx512": "avx512_q8_0"},
}
# matrices that ggml's own operations read
LEFT_TO_GGML = ("positions.weight", "router.weight")

MEASURED_ROWS = (8, 4, 2)  # with more rows tiles were always faster
ROUNDS = 3  # of each layout; the fastest one counts
SMALLEST_ITEMS = 1 << 18  # of a weight worth measuring
TIMED_BYTES = 24 << 20  # of weights of one type in a row: more than the caches of one core hold
WORTH_CHANGING = 0.9  # share of the seconds by tiles

DotCounts = Mapping[int, frozenset[int]]  # by weight type: the row counts that dot products are faster for


def own_library() -> ctypes.CDLL | None:
    """noodle's library; None if it was not built or cannot be loaded."""
    try:
        path = folder_of_libraries() / LIBRARY_NAME
    except GgmlUnavailable:
        return None
    return _loaded(path) if path.is_file() else None


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("noodle's kernels %s cannot be loaded, ggml's kernels compute instead: %s", path, error)
        return None


def own_operations(ggml: GgmlCalls) -> CustomOperations | None:
    """Operations by noodle's library; None if it was not built, or by an older noodle."""
    library = own_library()
    if library is None:
        return None
    if not hasattr(library, "noodle_has_avx2"):
        log.warning("noodle's kernels are older than this noodle, ggml's compute instead; `make setup` builds them")
        return None
    return CustomOperations(ggml, library)


def _fastest(operations: CustomOperations, instructions: Mapping[str, str], only: str | None) -> str:
    """The fastest instructions that this processor has; empty if it has none."""
    names = [name for name, question in instructions.items() if only in (None, name) and operations.supports(question)]
    return names[-1] if names else ""


class _AttentionParameters(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class FlashAttentionKernel:
    """Attention of several tokens (kernels/attention.h).

    A single token is left to ggml: it fills only as many of the kernel's 16 query lanes as heads share a KV head.
    """

    def __init__(self, operations: CustomOperations, instructions: str) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self._name = f"attend_{instructions}"
        self._parameters: dict[tuple[float, float, int, int], _AttentionParameters] = {}  # graphs hold their addresses

    def attend(self, context: Any, query: int, key: int, value: int, *, scale: float, cap: float, window: int) -> int:
        """Like ggml's flash_attn_ext with a causal mask of this window (0 is none).

        Q float32 [head_dim, tokens, heads], K and V [head_dim, keys, kv_heads]; the last key belongs to the last token.
        Returns [head_dim, heads, tokens].
        """
        tensor = self._ggml.ggml_tensor.from_address
        dimensions, tokens, heads = (int(size) for size in tensor(query).ne[:3])
        fields = (scale, cap, window, int(tensor(key).type))
        parameters = self._parameters.setdefault(fields, _AttentionParameters(*fields))
        return self._operations.add(
            context,
            self._name,
            sizes=(dimensions, heads, tokens),
            sources=(query, key, value),
            parameters=ctypes.addressof(parameters),
        )


def flash_attention_kernel(
    ggml: GgmlCalls, head_dim: int, key_type: int, *, only: str | None = None
) -> FlashAttentionKernel | None:
    """The kernel for a head dimension and ggml's number of the type of K and V.

    None if it was not built, does not take these, or does not run on this processor (`only` with some instructions).
    """
    if key_type not in HEAD_DIM_MULTIPLES or head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLES[key_type]:
        return None
    operations = own_operations(ggml)
    instructions = _fastest(operations, FLOATS, only) if operations else ""
    return FlashAttentionKernel(operations, instructions) if operations and instructions else None


class PackedWeights:
    """GEMM with weights in the layout of kernels/packed_weights.h; `instructions` by the type of the weights."""

    def __init__(self, operations: CustomOperations, instructions: Mapping[str, str]) -> None:
        self._ggml, self._operations = operations.ggml, operations
        self.instructions = dict(instructions)
        self._type_names = {TYPE_NUMBERS[name]: name for name in instructions}

    def pack(self, blocks: Mapping[str, WeightBlock], *, also_embedding: bool) -> frozenset[tuple[str, str]]:
        """Pack suitable matrices in place; returns their blocks and names.

        Embeddings are packed only on request: their rows are then read by `take_rows`.
        """
        packed = set()
        for block_name, block in blocks.items():
            for layout in block.tensors:
                if self.is_packed(block_name, layout, also_embedding=also_embedding):
                    self.pack_matrix(layout, block)
                    packed.add((block_name, layout.name))
        return frozenset(packed)

    def is_packed(self, block_name: str, layout: TensorLayout, *, also_embedding: bool) -> bool:
        """Whether a tensor of a block is one that `pack` packs."""
        name = self._type_names.get(layout.type_number)
        if name is None or len(layout.sizes) != 2 or layout.name in LEFT_TO_GGML:
            return False
        length, outputs = layout.sizes
        is_wanted = also_embedding or block_name != "embedding"
        return is_wanted and outputs % GROUP_ROWS == 0 and length % UNIT_ITEMS[name] == 0

    def multiplies(self, weight: int) -> bool:
        """Whether there are kernels for the type of a weight."""
        return int(self._ggml.ggml_tensor.from_address(weight).type) in self._type_names

    def tiles_of(self, weight: int) -> str:
        """The kind of tiles that a packed weight is multiplied by."""
        name = self._type_of(weight)
        return f"{TILES[name]}_{self.instructions[name]}"

    def tiles(self, context: Any, rows: int, kind: str) -> int:
        """Rows [features, count] in float32 as tiles, for any number of products."""
        features, count = self._ggml.ggml_tensor.from_address(rows).ne[:2]
        arrangement, _, instructions = kind.rpartition("_")
        row_bytes = {
            "arrange": 4 * features,
            "arrange_bf16": 2 * features,
            "quantise": features // BLOCK_ITEMS * TILE_BLOCK_BYTES[instructions],
        }[arrangement]
        return self._operations.add(
            context, kind, kind=self._ggml.GGML_TYPE_I8, sizes=(row_bytes, count), sources=(rows,)
        )

    def product(self, context: Any, weight: int, tiles: int) -> int:
        """Like ggml's mul_mat of a packed weight and the rows of the tiles."""
        count = self._ggml.ggml_tensor.from_address(tiles).ne[1]
        outputs = self._ggml.ggml_tensor.from_address(weight).ne[1]
        kind = self._type_of(weight)
        name = f"multiply_{kind}_{self.instructions[kind]}"
        return self._operations.add(context, name, sizes=(outputs, count), sources=(weight, tiles))

    def take_rows(self, context: Any, weight: int, ids: int) -> int:
        """Like ggml's get_rows of a packed weight."""
        features = self._ggml.ggml_tensor.from_address(weight).ne[0]
        count = self._ggml.ggml_tensor.from_address(ids).ne[0]
        name = f"take_rows_{self._type_of(weight)}"
        return self._operations.add(context, name, sizes=(features, count), sources=(weight, ids))

    def pack_matrix(self, layout: TensorLayout, block: WeightBlock) -> None:
        """Pack a matrix in place; several may be packed at once."""
        length, outputs = layout.sizes
        memory = block.bytes_of(layout)
        name = self._type_names[layout.type_number]
        units = length // UNIT_ITEMS[name] if UNIT_BYTES[name] else length
        spare = np.empty(GROUP_ROWS * layout.byte_count // outputs, np.uint8)
        self._operations.library.noodle_pack(
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_void_p(spare.ctypes.data),
            *(ctypes.c_int64(number) for number in (outputs, units, UNIT_BYTES[name])),
        )

    def _type_of(self, weight: int) -> str:
        return self._type_names[int(self._ggml.ggml_tensor.from_address(weight).type)]


def packed_weights(ggml: GgmlCalls, *, only: str | None = None) -> PackedWeights | None:
    """The GEMM kernels (`only` those with some instructions); None if none was built or runs on this processor."""
    operations = own_operations(ggml)
    if operations is None:
        return None
    fastest = {name: _fastest(operations, instructions, only) for name, instructions in INSTRUCTIONS.items()}
    available = {name: instructions for name, instructions in fastest.items() if instructions}
    return PackedWeights(operations, available) if available else None


def dot_counts(device: GgmlDevice, weights: Sequence[int], kept: Path | None = None) -> DotCounts:
    """Measure for which small row counts ggml multiplies faster by dot products than by tiles.

    ggml has two kernels for a weight and several rows: tiles of the product, made for prompts, and dot products, used
    for experts. On an AMD processor tiles took twice as long as dot products for two rows, a quarter longer for four
    rows in 8 bits, and two thirds as long for sixteen rows.

    `weights` are a slice's matrices with their data in place; the backend's threads compute. The file `kept` holds the
    counts of the types that were measured before on this machine with these threads.
    """
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
    known = _read_counts(kept)
    lacking = [kind for kind in by_type if kind not in known]
    known.update({kind: _counts_of(device, by_type[kind]) for kind in lacking})
    if lacking and kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, msgspec.json.encode({str(kind): sorted(found) for kind, found in known.items()}))
        except OSError as error:
            log.warning("%s is not kept (%s): it is measured again at each start", kept, error.strerror or error)
    return {kind: known[kind] for kind in by_type}


def _counts_of(device: GgmlDevice, weights: Sequence[int]) -> frozenset[int]:
    """The row counts from 2 on that dot products are faster for: they lose against tiles as rows become more."""
    return frozenset(range(2, next((most for most in MEASURED_ROWS if _dots_are_faster(device, weights, most)), 1) + 1))


def _read_counts(kept: Path | None) -> dict[int, frozenset[int]]:
    if kept is None:
        return {}
    try:
        found = msgspec.json.decode(kept.read_bytes(), type=dict[str, list[int]])
        return {int(kind): frozenset(counts) for kind, counts in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be read and is measured again: %s", kept, error)
        return {}


def product_by_dots(ggml: Any, context: Any, weight: int, rows: int, expert_zero: int) -> int:
    """Like mul_mat of a weight and rows [features, count]; `expert_zero` [1, count] selects expert 0 for each row."""
    features, count = ggml.ggml_tensor.from_address(rows).ne[:2]
    each = ggml.ggml_reshape_3d(context, rows, features, 1, count)
    product = ggml.ggml_mul_mat_id(context, weight, each, expert_zero)
    return int(ggml.ggml_reshape_2d(context, product, ggml.ggml_tensor.from_address(product).ne[0], count))


def new_expert_zero(memory: GraphMemory, count: int) -> int:
    """A tensor that selects expert 0 for each row; zero it once the graph is allocated."""
    return memory.persist(int(memory.ggml.ggml_new_tensor_2d(memory.context, memory.ggml.GGML_TYPE_I32, 1, count)))


def write_expert_zero(memory: GraphMemory, expert_zero: int, count: int) -> None:
    """Write the selection into an allocated graph; `expert_zero` is 0 in a graph without one."""
    if expert_zero:
        memory.array(expert_zero, (count,), "<i4")[...] = 0


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
    expert_zero = new_expert_zero(memory, count)
    rows_by_features: dict[int, int] = {}
    for weight in weights:
        features = int(ggml.ggml_tensor.from_address(weight).ne[0])
        if features not in rows_by_features:
            rows = ggml.ggml_new_tensor_2d(memory.context, ggml.GGML_TYPE_F32, features, count)
            rows_by_features[features] = memory.persist(int(rows))
        rows = rows_by_features[features]
        product = (
            product_by_dots(ggml, memory.context, weight, rows, expert_zero)
            if by_dots
            else ggml.ggml_mul_mat(memory.context, weight, rows)
        )
        ggml.ggml_build_forward_expand(memory.graph, product)
    for tensor in (expert_zero, *rows_by_features.values()):
        ggml.ggml_build_forward_expand(memory.graph, tensor)
    memory.allocate()
    write_expert_zero(memory, expert_zero, count)
    for features, rows in rows_by_features.items():
        memory.array(rows, (count, features), "<f4")[...] = np.float32(0.5)
    return memory
