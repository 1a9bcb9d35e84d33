"""Reads weights as a model's files store them or makes them in another of ggml's types, and hands them to ggml.

Made weights are kept: a kept file holds one block in one type: a layer, the embeddings or the head. All files are
read, not mapped: weights in large pages decode 1.25 times as fast as in a file's pages of 4 kB.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.formats import STORED
from noodle.model.ggml_types import GGML_TYPES, GgmlType
from noodle.model.tensor_entry import TensorEntry
from services.stage.executors.base import Fetch, ReadCounter
from services.stage.executors.ggml.backend import DeviceMemory, GgmlDevice
from services.stage.executors.ggml.tensor_map import Cut, TensorSource, leading_range, shape_of_cut
from services.stage.executors.kept_weights import keep, read_kept
from services.stage.executors.safetensors import unsupported_dtype
from services.stage.executors.tensor_files import TensorFiles

Bytes = npt.NDArray[np.uint8]

# the types that weights are made in, with ggml's numbers
TYPE_NUMBERS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}
# the type of a matrix whose row length is not a multiple of a type's blocks
FALLBACK_TYPES = {"q4_K": "q8_0", "q4_0": "f16", "q8_0": "f16"}
ALIGNMENT = 64
GROUP_ROWS = 16  # of a matrix that lie side by side in the layout of noodle's kernels
PIECE_ITEMS = 1 << 20  # converted at once, which avoids a float32 copy of a large matrix
READ_BYTES = 16 << 20  # read at once
# the parts of a joined matrix, kept apart if their types differ
PARTS: Mapping[str, tuple[str, ...]] = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
OTHER_CURE = "Choose other weights (for example NOODLE_WEIGHTS=q8_0), or the model in another format."
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Type and place of one tensor in a block of memory."""

    name: str
    type_number: int
    sizes: tuple[int, ...]
    offset: int
    byte_count: int
    is_matrix: bool = True  # not the weights of a norm, which may have two axes too


@dataclass(frozen=True)
class WeightBlock:
    """Memory with tensors in it."""

    tensors: tuple[TensorLayout, ...]
    memory: Bytes

    def bytes_of(self, tensor: TensorLayout) -> Bytes:
        return self.memory[tensor.offset : tensor.offset + tensor.byte_count]


def layout_of(
    ggml: Any, tensors: Sequence[TensorSource], type_of: Callable[[TensorSource], int]
) -> tuple[TensorLayout, ...]:
    """Place tensors one after another; `type_of` gives ggml's number of each tensor's type."""
    layouts: list[TensorLayout] = []
    offset = 0
    for tensor in tensors:
        number = type_of(tensor)
        byte_count = int(ggml.ggml_row_size(number, tensor.sizes[0])) * tensor.row_count
        is_matrix = tensor.is_matrix or tensor.is_multiplied
        layouts.append(TensorLayout(tensor.name, number, tensor.sizes, offset, byte_count, is_matrix=is_matrix))
        offset += _room_of(layouts[-1])
    return tuple(layouts)


Finish = Callable[[str, TensorLayout, WeightBlock], None]  # a tensor of the block of a name


def leave_as_is(_name: str, _layout: TensorLayout, _block: WeightBlock) -> None:
    """Do nothing with a tensor that is complete."""


class WeightMaker:
    """Makes the blocks of a slice from its model's files; converted ones are kept in `kept_folder`, if there is one.

    `multiplies` tells whether the device multiplies by matrices of a type, given ggml's number of it.
    """

    def __init__(
        self,
        ggml: Any,
        files: TensorFiles,
        counter: ReadCounter,
        *,
        multiplies: Callable[[int], bool],
        threads: int = 1,
        kept_folder: Path | None = None,
    ) -> None:
        self._ggml = ggml
        self._files = files
        self._counter = counter
        self._multiplies = multiplies
        self._threads = threads
        self._kept_folder = kept_folder

    def blocks(
        self, wanted: Mapping[str, Sequence[TensorSource]], weights: str, fetch: Fetch, finish: Finish = leave_as_is
    ) -> dict[str, WeightBlock]:
        """Blocks with the tensors of each name, read if kept, otherwise made.

        `fetch` receives the names to be read. `finish` is called with each tensor that is complete, on any thread and
        while others are still read. Raises UnsupportedModel for a tensor whose type cannot be computed with.
        """

        def type_of(tensor: TensorSource) -> int:
            name = weights if tensor.is_matrix else "f32"
            while tensor.sizes[0] % self._ggml.ggml_blck_size(TYPE_NUMBERS[name]):
                name = FALLBACK_TYPES[name]
            return TYPE_NUMBERS[name]

        if weights == STORED:
            wanted = {name: self._as_stored(tensors) for name, tensors in wanted.items()}
            layouts = {name: layout_of(self._ggml, tensors, self._stored_number) for name, tensors in wanted.items()}
        else:
            layouts = {name: layout_of(self._ggml, tensors, type_of) for name, tensors in wanted.items()}
        blocks = empty_blocks(layouts)
        lacking = [name for name, block in blocks.items() if weights == STORED or not self._is_kept(name, block)]
        names = list(dict.fromkeys(key for name in lacking for tensor in wanted[name] for key in tensor.sources))
        self._counter.total_bytes = sum(self._entry(name).byte_count for name in names)
        if names:
            fetch([stored for name in names for stored in self._files.stored_names(name)])
        self._counter.add(0)
        made = [(name, *each) for name in lacking for each in zip(wanted[name], blocks[name].tensors, strict=True)]
        as_read = finish if weights == STORED else leave_as_is  # what is kept is as it was made
        self._run(
            piece
            for name, tensor, layout in made
            for piece in self._then(partial(as_read, name, layout, blocks[name]), tensor, layout, blocks[name])
        )
        if weights != STORED:
            for name in lacking:
                self._keep(name, blocks[name])
            self._run(
                partial(finish, name, layout, block) for name, block in blocks.items() for layout in block.tensors
            )
        return blocks

    def _run(self, calls: Iterable[Callable[[], None]]) -> None:
        """Make all calls, some at once; after an error those that have not begun are left out."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weights")
        try:
            for done in [pool.submit(call) for call in calls]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _then(
        self, finish: Callable[[], None], tensor: TensorSource, layout: TensorLayout, block: WeightBlock
    ) -> list[Callable[[], None]]:
        """The calls that fill a tensor, the last of which finishes it."""
        pieces = list(self._pieces(block.bytes_of(layout), tensor, layout))
        left = itertools.count(len(pieces) - 1, -1)  # one call of next is one step, whatever the thread

        def run(piece: Callable[[], None]) -> None:
            piece()
            if next(left) == 0:
                finish()

        return [partial(run, piece) for piece in pieces]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32."""
        shape = self._entry(name).shape
        return self._values(name, 0, math.prod(shape)).reshape(shape)

    def _as_stored(self, tensors: Sequence[TensorSource]) -> list[TensorSource]:
        """The tensors in the files' types: a joined matrix is split where its parts have different types."""
        mixed = {
            tensor.name.partition(".")[0]
            for tensor in tensors
            if tensor.is_matrix and len({self._stored_type(name).number for name in tensor.sources}) > 1
        }
        stored: list[TensorSource] = []
        for tensor in tensors:
            whole, _, kind = tensor.name.partition(".")
            if whole == "query_key_norm" and "query_key_value" in mixed:
                # each norm is a source as often as there are heads
                stored += self._parts(tensor, ("query_norm", "key_norm"), kind, tuple(dict.fromkeys(tensor.sources)))
            elif whole in PARTS and whole in mixed:
                stored += self._parts(tensor, PARTS[whole], kind, tensor.sources)
            else:
                stored.append(tensor)
        return stored

    def _parts(
        self, tensor: TensorSource, names: Sequence[str], kind: str, sources: Sequence[str]
    ) -> Iterator[TensorSource]:
        for name, source in zip(names, sources, strict=True):
            shape = self._entry(source).shape
            sizes = shape if tensor.transposed else shape[::-1]
            yield replace(tensor, name=f"{name}.{kind}", sources=(source,), sizes=sizes)

    def _stored_number(self, tensor: TensorSource) -> int:
        """ggml's number of a tensor's type; for joined experts of several types that of the first float type."""
        if not tensor.is_matrix:
            return TYPE_NUMBERS["f32"]
        kinds = {self._stored_type(name) for name in tensor.sources}
        if len(kinds) > 1:
            return TYPE_NUMBERS["f32"]
        kind = kinds.pop()
        if tensor.transposed and kind.block_items > 1:
            return TYPE_NUMBERS["f32"]  # blocks lie along the stored rows
        if not self._multiplies(kind.number):
            entry = self._entry(tensor.sources[0])
            raise UnsupportedModel(
                f"tensor {tensor.sources[0]} of {entry.file} is of type {kind.name}, which this device does not "
                "multiply by.",
                cure=OTHER_CURE,
            )
        return kind.number

    def _stored_type(self, name: str) -> GgmlType:
        """The type that a tensor is held in: its own, or float32 for float64."""
        entry = self._entry(name)
        kind = GGML_TYPES.get("F32" if entry.dtype == "F64" else entry.dtype)
        if kind is None:
            raise unsupported_dtype(name, entry)
        return kind

    def _entry(self, name: str) -> TensorEntry:
        entry = self._files.find(name)
        if entry is None:
            raise ModelNotFound(f"the model lacks the tensor {name}.", cure="Fetch it again.")
        return entry

    def _is_kept(self, name: str, block: WeightBlock) -> bool:
        """Read a block from its kept file, if that is whole and of the same layout."""
        path = self._kept_folder and self._kept_folder / f"{name}.weights"
        return path is not None and read_kept(path, _described(block.tensors), block.memory)

    def _keep(self, name: str, block: WeightBlock) -> None:
        if self._kept_folder is not None:
            keep(self._kept_folder / f"{name}.weights", _described(block.tensors), block.memory)

    def _pieces(self, target: Bytes, tensor: TensorSource, layout: TensorLayout) -> Iterator[Callable[[], None]]:
        """Calls that fill a tensor's memory together, in any order."""
        if not tensor.is_matrix:
            yield lambda: self._fill_vector(target, tensor)
            return
        row_bytes = layout.byte_count // tensor.row_count
        first = 0
        for index, name in enumerate(tensor.sources):
            entry, cut = self._entry(name), tensor.cut(index)
            rows = math.prod(shape_of_cut(entry.shape, cut)) // tensor.sizes[0]
            part = target[first * row_bytes : (first + rows) * row_bytes]
            first += rows
            is_raw = entry.dtype != "F64" and self._stored_type(name).number == layout.type_number
            if is_raw and cut and not tensor.transposed:
                yield partial(self._copy_cut, name, cut, part)
                continue
            if tensor.transposed or cut:
                yield partial(self._convert_cut, name, cut, part, number=layout.type_number, turned=tensor.transposed)
                continue
            step = READ_BYTES // row_bytes if is_raw else PIECE_ITEMS // tensor.sizes[0]
            fill = self._copy if is_raw else partial(self._convert, layout.type_number, tensor.sizes[0])
            for begin in range(0, rows, max(1, step)):
                end = min(rows, begin + max(1, step))
                yield partial(fill, name, part[begin * row_bytes : end * row_bytes], begin, end)

    def _fill_vector(self, target: Bytes, tensor: TensorSource) -> None:
        values = {name: self.values(name) + np.float32(tensor.offset) for name in dict.fromkeys(tensor.sources)}
        parts = [values[name][tensor.cut(index)] for index, name in enumerate(tensor.sources)]
        flat = np.concatenate([part.reshape(-1) for part in parts])
        target[:] = flat.astype("<f4").view(np.uint8)

    def _copy(self, name: str, target: Bytes, first_row: int, end_row: int) -> None:
        """Read rows as they are stored."""
        row_bytes = len(target) // (end_row - first_row)
        self._files.read(name, target.data, first_row * row_bytes)
        self._counter.add(len(target))

    def _convert(self, number: int, length: int, name: str, target: Bytes, first_row: int, end_row: int) -> None:
        values = self._values(name, first_row * length, (end_row - first_row) * length)
        quantize(self._ggml, number, values.reshape(-1, length), target)

    def _copy_cut(self, name: str, cut: Cut, target: Bytes) -> None:
        """Read some rows of a tensor as they are stored."""
        entry = self._entry(name)
        row_bytes = entry.byte_count // math.prod(entry.shape[:-1])
        begin, end, rest = leading_range(entry.shape, cut)
        raw = np.empty((end - begin) * math.prod(entry.shape[1:-1]) * row_bytes, np.uint8)
        self._files.read(name, raw.data, begin * math.prod(entry.shape[1:-1]) * row_bytes)
        self._counter.add(raw.nbytes)
        target[:] = raw.reshape(end - begin, *entry.shape[1:-1], row_bytes)[rest].reshape(-1)

    def _convert_cut(self, name: str, cut: Cut, target: Bytes, *, number: int, turned: bool) -> None:
        """Read a part of a tensor, transposed if `turned`."""
        shape = self._entry(name).shape
        begin, end, rest = leading_range(shape, cut)
        items = math.prod(shape[1:])
        values = self._values(name, begin * items, (end - begin) * items).reshape(end - begin, *shape[1:])[rest]
        values = values.reshape(values.shape[-2:]).T if turned else values
        quantize(self._ggml, number, np.ascontiguousarray(values).reshape(-1, values.shape[-1]), target)

    def _values(self, name: str, first_item: int, items: int) -> npt.NDArray[np.float32]:
        """Items of a tensor as float32; they are whole blocks of its type."""
        entry = self._entry(name)
        kind = GGML_TYPES.get(entry.dtype)
        if kind is None:
            raise unsupported_dtype(name, entry)
        raw = np.empty(kind.byte_count(items), np.uint8)
        self._files.read(name, raw.data, kind.byte_count(first_item))
        self._counter.add(raw.nbytes)
        if kind.name in NUMPY_TYPES:
            return np.asarray(raw.view(NUMPY_TYPES[kind.name]), np.float32)
        values = np.empty(items, np.float32)
        traits = self._ggml.ggml_type_traits.from_address(self._ggml.ggml_get_type_traits(kind.number))
        address = ctypes.cast(traits.to_float, ctypes.c_void_p).value
        if not address:
            raise unsupported_dtype(name, entry)
        _TO_FLOAT(address)(raw.ctypes.data, values.ctypes.data, items)
        return values


def quantize(ggml: Any, type_number: int, values: npt.NDArray[np.float32], target: Bytes) -> None:
    """Write rows [rows, length] in one of ggml's types to the beginning of `target`."""
    values = np.ascontiguousarray(values, np.float32)
    if type_number == TYPE_NUMBERS["f32"]:
        target[: values.nbytes] = values.view(np.uint8).reshape(-1)
    else:
        arguments = (values.ctypes.data, target.ctypes.data, 0, *values.shape, None)
        ggml.ggml_quantize_chunk(type_number, *arguments)


def empty_blocks(layouts: Mapping[str, tuple[TensorLayout, ...]]) -> dict[str, WeightBlock]:
    """Blocks in one piece of memory, which wastes little of its last large page."""
    sizes = {name: layout[-1].offset + _room_of(layout[-1]) for name, layout in layouts.items()}
    memory = own_memory(sum(sizes.values()))
    blocks: dict[str, WeightBlock] = {}
    begin = 0
    for name, layout in layouts.items():
        blocks[name] = WeightBlock(layout, memory[begin : begin + sizes[name]])
        begin += sizes[name]
    return blocks


def own_memory(byte_count: int) -> Bytes:
    """Zeros in pages of their own, large ones if the system has them; freed with the last array on them."""
    pages = mmap.mmap(-1, max(1, byte_count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _room_of(layout: TensorLayout) -> int:
    """Bytes of a tensor's place: matrices can be filled up to whole groups of noodle's layout."""
    rows = layout.sizes[1] if layout.is_matrix and len(layout.sizes) == 2 else 0
    return _aligned(layout.byte_count // rows * -(-rows // GROUP_ROWS) * GROUP_ROWS if rows else layout.byte_count)


def _aligned(byte_count: int) -> int:
    return -(-byte_count // ALIGNMENT) * ALIGNMENT


def _described(layout: Sequence[TensorLayout]) -> list[list[Any]]:
    return [[each.name, each.type_number, list(each.sizes), each.offset, each.byte_count] for each in layout]


class GgmlTensors:
    """Blocks of weights as ggml's tensors, by block and name. `close` frees what ggml holds for them.

    Weights in host memory stay in place; for a card they are copied to its memory.
    """

    def __init__(self, device: GgmlDevice, blocks: dict[str, WeightBlock]) -> None:
        ggml = self._ggml = device.ggml
        self._blocks = blocks if device.is_host else {}  # keeps their memory alive
        self._memory: list[DeviceMemory] = []
        self._buffers: list[Any] = []
        count = sum(len(block.tensors) for block in blocks.values())
        self._context = ggml.ggml_init(
            ggml.ggml_init_params(mem_size=ggml.ggml_tensor_overhead() * (count + 1), mem_buffer=None, no_alloc=True)
        )
        place = self._place_in_host_memory if device.is_host else self._copy_to_card
        self.by_block = {name: place(device, block) for name, block in blocks.items()}
        self.byte_count = sum(tensor.byte_count for block in blocks.values() for tensor in block.tensors)

    def _place_in_host_memory(self, device: GgmlDevice, block: WeightBlock) -> dict[str, int]:
        ggml, address = self._ggml, int(block.memory.ctypes.data)
        largest = max(tensor.byte_count for tensor in block.tensors)
        ggml_device = ggml.ggml_backend_get_device(device.backend)
        buffer = ggml.ggml_backend_dev_buffer_from_host_ptr(ggml_device, address, len(block.memory), largest)
        if not buffer:
            raise ModelNotFound("ggml cannot use weights in this machine's memory.", cure="Report this.")
        ggml.ggml_backend_buffer_set_usage(buffer, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self._buffers.append(buffer)
        tensors: dict[str, int] = {}
        for layout in block.tensors:
            tensor = tensors[layout.name] = self._tensor(layout)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, address + layout.offset)
        return tensors

    def _copy_to_card(self, device: GgmlDevice, block: WeightBlock) -> dict[str, int]:
        """Copy a block with the alignment and padding that the card needs."""
        ggml, kind = self._ggml, device.buffer_type
        alignment = int(ggml.ggml_backend_buft_get_alignment(kind))
        tensors = {layout.name: self._tensor(layout) for layout in block.tensors}
        offsets, end = [], 0
        for tensor in tensors.values():
            offsets.append(end)
            end += -(-int(ggml.ggml_backend_buft_get_alloc_size(kind, tensor)) // alignment) * alignment
        memory = DeviceMemory(device, end)
        ggml.ggml_backend_buffer_set_usage(memory.buffer, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self._memory.append(memory)
        for layout, tensor, offset in zip(block.tensors, tensors.values(), offsets, strict=True):
            ggml.ggml_backend_tensor_alloc(memory.buffer, tensor, memory.address + offset)
            ggml.ggml_backend_tensor_set(tensor, block.bytes_of(layout).ctypes.data, 0, layout.byte_count)
        return tensors

    def _tensor(self, layout: TensorLayout) -> int:
        ggml = self._ggml
        sizes = (ctypes.c_int64 * len(layout.sizes))(*layout.sizes)
        tensor = ggml.ggml_new_tensor(self._context, layout.type_number, len(layout.sizes), ctypes.addressof(sizes))
        if ggml.ggml_nbytes(tensor) != layout.byte_count:
            raise ModelNotFound(f"{layout.name} has another size in this ggml than in its file.", cure="Report this.")
        return int(tensor)

    def close(self) -> None:
        """Free what ggml holds, once."""
        for buffer in self._buffers:
            self._ggml.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._memory.clear()
        if self._context:
            self._ggml.ggml_free(self._context)
            self._context = None
