"""Weights as ggml computes with them: made once from safetensors and kept in files; knows no layer and no graph.

A kept file holds one layer, or the embeddings, or the head, in one type. It is read, not mapped: a slice's weights
stand in large pages, in which decoding was measured to be 1.25 times as fast as in a file's pages of 4 kB.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.errors import ModelNotFound
from services.stage.executors.ggml.device import DeviceMemory, GgmlDevice
from services.stage.executors.ggml.tensor_map import Recipe, keys_of
from services.stage.executors.reading import Fetch, ReadCounter
from services.stage.executors.safetensors import SafetensorsFolder

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

# the types that weights are made in, by ggml's numbers
TYPE_NUMBERS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}
# what a matrix is stored in where its rows are no multiple of a type's blocks
NEXT_BEST = {"q4_K": "q8_0", "q4_0": "f16", "q8_0": "f16"}
ALIGNMENT = 64
HEADER_BYTES = 1 << 16
PIECE_ITEMS = 1 << 20  # converted at once, so that no float32 copy of a large matrix stands beside it
MAGIC = b"noodle ggml weights 1\n"
SAMPLES, SAMPLE_BYTES = 64, 4096
FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor in a block of memory."""

    name: str
    type_number: int
    sizes: tuple[int, ...]
    offset: int
    byte_count: int


@dataclass(frozen=True)
class Block:
    """Memory with tensors in it."""

    tensors: tuple[Placed, ...]
    memory: Bytes


def layout_of(ggml: Any, recipes: Sequence[Recipe], weights: str) -> tuple[Placed, ...]:
    """Where each tensor of some recipes goes, and in which type."""
    placed: list[Placed] = []
    offset = 0
    for recipe in recipes:
        kind = weights if recipe.is_matrix else "f32"
        while recipe.sizes[0] % ggml.ggml_blck_size(TYPE_NUMBERS[kind]):
            kind = NEXT_BEST[kind]
        row_bytes = ggml.ggml_row_size(TYPE_NUMBERS[kind], recipe.sizes[0])
        byte_count = row_bytes * recipe.row_count
        placed.append(Placed(recipe.name, TYPE_NUMBERS[kind], recipe.sizes, offset, byte_count))
        offset += -(-byte_count // ALIGNMENT) * ALIGNMENT
    return tuple(placed)


class WeightMaker:
    """Makes blocks from one model's safetensors, or takes those that were kept in `kept_folder`."""

    def __init__(self, ggml: Any, files: SafetensorsFolder, counter: ReadCounter, kept_folder: Path | None) -> None:
        self._ggml = ggml
        self._files = files
        self._counter = counter
        self._kept_folder = kept_folder

    def blocks(self, wanted: Mapping[str, Sequence[Recipe]], weights: str, fetch: Fetch) -> dict[str, Block]:
        """The tensors of each name's recipes, as they were kept or made now; `fetch` gets the keys that are read."""
        layouts = {name: layout_of(self._ggml, recipes, weights) for name, recipes in wanted.items()}
        blocks = empty_blocks(layouts)
        lacking = [name for name, block in blocks.items() if not self._take_kept(name, block)]
        recipes = [recipe for name in lacking for recipe in wanted[name]]
        self._counter.total_bytes = sum(self._bytes_of(recipe) for recipe in recipes)
        if recipes:
            fetch(keys_of(recipes))
        self._counter.add(0)
        for name in lacking:
            block = blocks[name]
            self._fill(block.memory, wanted[name], block.tensors)
            self._keep(name, block)
        return blocks

    def _take_kept(self, name: str, block: Block) -> bool:
        """Read a block from its kept file; False where there is none, or it is damaged or of another layout."""
        path = self._path(name)
        if path is None:
            return False
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != HEADER_BYTES + len(block.memory):
                    return False
                header = file.read(HEADER_BYTES).rstrip(b"\0")
                described = json.loads(header.removeprefix(MAGIC)) if header.startswith(MAGIC) else {}
                if described.get("layout") != _described(block.tensors):
                    return False
                done = 0
                while done < len(block.memory):
                    read = file.readinto(block.memory[done:].data)
                    if not read:
                        return False
                    done += read
        except (OSError, ValueError):
            return False
        if described.get("digest") != _sampled_digest(block.memory):
            log.warning("%s is damaged and made anew", path)
            return False
        return True

    def _bytes_of(self, recipe: Recipe) -> int:
        """Bytes that making its tensor reads."""
        entries = (self._files.find(key).entries[key]["data_offsets"] for key in dict.fromkeys(recipe.sources))
        return sum(int(end) - int(begin) for begin, end in entries)

    def _path(self, name: str) -> Path | None:
        return None if self._kept_folder is None else self._kept_folder / f"{name}.weights"

    def _keep(self, name: str, block: Block) -> None:
        """Write a block's file, whole or not at all; where it can not be written, the block is made at each start."""
        path = self._path(name)
        if path is None:
            return
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        described = {"layout": _described(block.tensors), "digest": _sampled_digest(block.memory)}
        header = MAGIC + json.dumps(described).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(header.ljust(HEADER_BYTES, b"\0"))
                file.write(block.memory.data)
            beside.replace(path)
        except OSError as error:
            log.warning("%s is not kept (%s): it is made anew at each start", path, error.strerror or error)
            with contextlib.suppress(OSError):  # the first one is told
                beside.unlink(missing_ok=True)

    def _fill(self, memory: Bytes, recipes: Sequence[Recipe], layout: Sequence[Placed]) -> None:
        for recipe, placed in zip(recipes, layout, strict=True):
            target = memory[placed.offset : placed.offset + placed.byte_count]
            row_bytes = placed.byte_count // recipe.row_count
            if not recipe.is_matrix:
                values = {key: self._whole(key) + np.float32(recipe.offset) for key in dict.fromkeys(recipe.sources)}
                flat = np.concatenate([values[key].reshape(-1) for key in recipe.sources])
                target[:] = flat.astype("<f4").view(np.uint8)
                continue
            row = 0
            for key in recipe.sources:
                row += self._convert(key, recipe, placed.type_number, target[row * row_bytes :], row_bytes)

    def _convert(self, key: str, recipe: Recipe, type_number: int, target: Bytes, row_bytes: int) -> int:
        """Write one source's rows to the beginning of `target`; how many they were comes back."""
        length = recipe.sizes[0]
        if recipe.transposed:
            whole = np.ascontiguousarray(self._whole(key).T)
            self._quantize(type_number, whole, target)
            return len(whole)
        rows = int(np.prod(self._files.find(key).entries[key]["shape"])) // length
        step = max(1, PIECE_ITEMS // length)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            values = self._read(key, first * length, count * length).reshape(count, length)
            self._quantize(type_number, values, target[first * row_bytes :])
        return rows

    def _quantize(self, type_number: int, values: npt.NDArray[np.float32], target: Bytes) -> None:
        if type_number == TYPE_NUMBERS["f32"]:
            target[: values.nbytes] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
            return
        values = np.ascontiguousarray(values, np.float32)
        rows, length = values.shape
        self._ggml.ggml_quantize_chunk(type_number, values.ctypes.data, target.ctypes.data, 0, rows, length, None)

    def _whole(self, key: str) -> npt.NDArray[np.float32]:
        shape = self._files.find(key).entries[key]["shape"]
        return self._read(key, 0, int(np.prod(shape))).reshape(shape)

    def _read(self, key: str, first_item: int, items: int) -> npt.NDArray[np.float32]:
        file = self._files.find(key)
        entry = file.entries[key]
        stored = FLOAT_TYPES.get(entry["dtype"])
        if stored is None:
            raise file.not_computed_with(key)
        values = np.empty(items, stored)
        file.read_into(values.view(np.uint8).data, int(entry["data_offsets"][0]) + first_item * stored.itemsize)
        self._counter.add(values.nbytes)
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(values, np.float32)


def empty_blocks(layouts: Mapping[str, tuple[Placed, ...]]) -> dict[str, Block]:
    """One piece of memory for all, so that little of its last large page is left over."""
    memory = own_memory(sum(bytes_in(layout) for layout in layouts.values()))
    blocks: dict[str, Block] = {}
    begin = 0
    for name, layout in layouts.items():
        end = begin + bytes_in(layout)
        blocks[name] = Block(layout, memory[begin:end])
        begin = end
    return blocks


def own_memory(byte_count: int) -> Bytes:
    """Zeros in pages of their own, large ones where the system has them; freed with the last array of them."""
    pages = mmap.mmap(-1, max(1, byte_count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def bytes_in(layout: Sequence[Placed]) -> int:
    """Bytes of a block, to the next one's beginning."""
    last = layout[-1]
    return -(-(last.offset + last.byte_count) // ALIGNMENT) * ALIGNMENT


def _described(layout: Sequence[Placed]) -> list[list[Any]]:
    return [[each.name, each.type_number, list(each.sizes), each.offset, each.byte_count] for each in layout]


def _sampled_digest(data: Bytes) -> str:
    """sha256 of pieces spread evenly over the data, both ends among them."""
    digest = hashlib.sha256()
    last = max(0, len(data) - SAMPLE_BYTES)
    for sample in range(SAMPLES):
        start = last * sample // (SAMPLES - 1)
        digest.update(data[start : start + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


class GgmlTensors:
    """Blocks of weights as ggml's tensors, each by its name in its block; frees what it made in `close`.

    In the machine's memory they stay where they are, to a card's they are copied.
    """

    def __init__(self, device: GgmlDevice, blocks: dict[str, Block]) -> None:
        ggml = self._ggml = device.ggml
        self._blocks = blocks if device.is_host else {}  # keeps their memory alive
        self._memory: list[DeviceMemory] = []
        count = sum(len(block.tensors) for block in blocks.values())
        self._context = ggml.ggml_init(
            ggml.ggml_init_params(mem_size=ggml.ggml_tensor_overhead() * (count + 1), mem_buffer=None, no_alloc=True)
        )
        self._buffers: list[Any] = []
        self.by_block: dict[str, dict[str, int]] = {}
        self.byte_count = 0
        for name, block in blocks.items():
            place = self._stay if device.is_host else self._copy
            self.by_block[name] = place(device, block)
            self.byte_count += sum(tensor.byte_count for tensor in block.tensors)

    def _stay(self, device: GgmlDevice, block: Block) -> dict[str, int]:
        ggml, address = self._ggml, int(block.memory.ctypes.data)
        largest = max(tensor.byte_count for tensor in block.tensors)
        ggml_device = ggml.ggml_backend_get_device(device.backend)
        buffer = ggml.ggml_backend_dev_buffer_from_host_ptr(ggml_device, address, len(block.memory), largest)
        if not buffer:
            raise ModelNotFound("ggml can not take weights from this machine's memory.", cure="Report this.")
        # so that ggml takes them for weights where it asks
        ggml.ggml_backend_buffer_set_usage(buffer, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self._buffers.append(buffer)
        tensors: dict[str, int] = {}
        for placed in block.tensors:
            tensor = tensors[placed.name] = self._tensor(placed)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, address + placed.offset)
        return tensors

    def _copy(self, device: GgmlDevice, block: Block) -> dict[str, int]:
        """Where a card has room for a block, at the bounds and with the surplus that it wants."""
        ggml, kind = self._ggml, device.buffer_type
        alignment = int(ggml.ggml_backend_buft_get_alignment(kind))
        tensors = {placed.name: self._tensor(placed) for placed in block.tensors}
        offsets, end = [], 0
        for tensor in tensors.values():
            offsets.append(end)
            end += -(-int(ggml.ggml_backend_buft_get_alloc_size(kind, tensor)) // alignment) * alignment
        memory = DeviceMemory(device, end)
        ggml.ggml_backend_buffer_set_usage(memory.buffer, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self._memory.append(memory)
        for placed, tensor, offset in zip(block.tensors, tensors.values(), offsets, strict=True):
            ggml.ggml_backend_tensor_alloc(memory.buffer, tensor, memory.address + offset)
            begin = int(block.memory.ctypes.data) + placed.offset
            ggml.ggml_backend_tensor_set(tensor, begin, 0, placed.byte_count)
        return tensors

    def _tensor(self, placed: Placed) -> int:
        ggml = self._ggml
        sizes = (ctypes.c_int64 * len(placed.sizes))(*placed.sizes)
        tensor = ggml.ggml_new_tensor(self._context, placed.type_number, len(placed.sizes), ctypes.addressof(sizes))
        if ggml.ggml_nbytes(tensor) != placed.byte_count:
            raise ModelNotFound(f"{placed.name} takes other bytes in this ggml than in its file.", cure="Report this.")
        return int(tensor)

    def close(self) -> None:
        """Free ggml's side of it, once."""
        for buffer in self._buffers:
            self._ggml.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._memory.clear()
        if self._context:
            self._ggml.ggml_free(self._context)
            self._context = None
