"""A ggml graph for a step of given token counts, and the fields that change from step to step.

A graph is built once for the token counts of a step's spans and computed many times. The places and lengths of the
sessions' rows are written into its tensors before each step: building a graph takes longer than computing a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed, GgmlUnavailable
from services.stage.executors.ggml.backend import DeviceMemory, GgmlDevice

Words = npt.NDArray[np.uint64]
_Transfers = list[tuple[int, npt.NDArray[Any]]]  # tensors and their arrays in host memory
NO_WINDOW = 1 << 40
ROW_MASKED = np.uint16(0xFC00)  # minus infinity in float16
MEMORY_CURE = (
    "Give this stage fewer layers (NOODLE_SPLIT), less KV cache (NOODLE_KV_BYTES) or smaller steps "
    "(NOODLE_STEP_TOKENS)."
)
EVERY_THREAD = -1  # ggml's GGML_N_TASKS_MAX
OPERATION_BYTES = 256  # of an operation's own memory at most: less than a tensor takes, and graphs have room for more
F32 = 0  # ggml's GGML_TYPE_F32

_FUNCTION: Any = type(ctypes.pythonapi.Py_IncRef).__mro__[1]  # base class of all libraries' functions
_POINTER: Any = ctypes.POINTER(ctypes.c_int).__mro__[1]


class GgmlCalls:
    """The module `ggml` with pointers as plain ints in its functions.

    Graphs pass tensors by the thousand, and ctypes' pointer objects cost more than the calls.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, _FUNCTION):
            arguments = [_plain(each) for each in found.argtypes or ()]
            address = ctypes.cast(found, ctypes.c_void_p).value or 0
            found = ctypes.CFUNCTYPE(_plain(found.restype), *arguments)(address)
        setattr(self, name, found)
        return found


def _plain(kind: Any) -> Any:
    """c_void_p for a pointer to anything but text."""
    return ctypes.c_void_p if isinstance(kind, type) and issubclass(kind, _POINTER) else kind


class _Operation(ctypes.Structure):
    """What kernels/pool.h declares; the fields of an operation follow."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("work", ctypes.c_int64 * 2),
    )


class CustomOperations:
    """Functions of noodle's own library as operations of ggml's graphs (GGML_OP_CUSTOM), on the CPU alone."""

    def __init__(self, ggml: GgmlCalls, library: ctypes.CDLL) -> None:
        self.ggml, self.library = ggml, library
        self._functions: dict[str, int] = {}
        self._compute_operation = ggml.ggml_custom_op_t(self._function("compute_operation"))
        fields = ggml.ggml_tensor
        offsets = (fields.data.offset, fields.ne.offset, fields.nb.offset, fields.src.offset)
        library.noodle_set_tensor_fields(*(ctypes.c_size_t(offset) for offset in offsets))

    def add(
        self,
        context: Any,
        name: str,
        *,
        sizes: Sequence[int],
        sources: Sequence[int],
        kind: int = F32,
        fields: ctypes.Structure | None = None,
    ) -> int:
        """Add a tensor of type `kind` that `noodle_{name}` computes.

        The function receives memory that lives as long as the graph: a `struct work` of its own (kernels/work.h),
        followed by a copy of `fields`.
        """
        tensors = (ctypes.c_void_p * len(sources))(*sources)
        address = self._operation(context, name, fields)
        options = (ctypes.addressof(tensors), len(sources), self._compute_operation, EVERY_THREAD, address)
        return int(self.ggml.ggml_custom_4d(context, kind, *(*sizes, 1, 1, 1)[:4], *options))

    def _operation(self, context: Any, name: str, fields: ctypes.Structure | None) -> int:
        """Address of an operation in the graph's memory."""
        head_bytes, field_bytes = ctypes.sizeof(_Operation), ctypes.sizeof(fields) if fields is not None else 0
        if head_bytes + field_bytes > OPERATION_BYTES:
            raise ValueError(f"the fields of an operation take {field_bytes} bytes; {OPERATION_BYTES - head_bytes} fit")
        address = int(self.ggml.ggml_new_buffer(context, head_bytes + field_bytes))
        operation = _Operation(self._function(name), address + _Operation.work.offset)
        ctypes.memmove(address, ctypes.addressof(operation), head_bytes)
        if fields is not None:
            ctypes.memmove(address + head_bytes, ctypes.addressof(fields), field_bytes)
        return address

    def supports(self, instructions: str) -> bool:
        """Ask the library whether this processor has the instructions of some kernels (noodle_has_*)."""
        supports = getattr(self.library, f"noodle_has_{instructions}")
        supports.restype = ctypes.c_bool
        return bool(supports())

    def _function(self, name: str) -> int:
        """Address of `noodle_{name}`."""
        if name not in self._functions:
            function = getattr(self.library, f"noodle_{name}")
            self._functions[name] = ctypes.cast(function, ctypes.c_void_p).value or 0
        return self._functions[name]


@dataclass(frozen=True, slots=True)
class SpanRows:
    """Where the rows of one span's session are, and which of them the step computes."""

    address: int
    buffer: int  # of a card's memory, 0 in host memory
    area_bytes: int
    first_position: int
    token_count: int


class GraphMemory:
    """A ggml context in memory of our own, whose tensor fields can be written many at once; data is on the device."""

    def __init__(self, device: GgmlDevice, tensor_count: int) -> None:
        ggml = self.ggml = device.ggml
        self.device = device
        # multiplications, by ggml's operations and by noodle's
        self.ggml_work = self.own_work = 0
        self._uploads: _Transfers = []
        self._downloads: _Transfers = []
        fields = ggml.ggml_tensor
        self.at_data = fields.data.offset // 8
        self.at_buffer = fields.buffer.offset // 8
        self.at_sizes = fields.ne.offset // 8
        self.at_strides = fields.nb.offset // 8
        self.at_view_source = fields.view_src.offset // 8
        self.at_view_offset = fields.view_offs.offset // 8
        graph_bytes = ggml.ggml_graph_overhead_custom(tensor_count, False)
        self.byte_count = (tensor_count + 8) * ggml.ggml_tensor_overhead() + graph_bytes
        memory = np.empty(self.byte_count // 8 + 8, np.uint64)
        first = (-memory.ctypes.data // 8) % 2  # ggml requires an alignment of 16 bytes
        self.words: Words = memory[first:]
        self.base = int(self.words.ctypes.data)
        parameters = ggml.ggml_init_params(mem_size=self.byte_count, mem_buffer=self.base, no_alloc=True)
        self.context = ggml.ggml_init(parameters)
        if not self.context:
            raise GenerationFailed("ggml could not make a graph.", cure=MEMORY_CURE)
        self.graph = ggml.ggml_new_graph_custom(self.context, tensor_count, False)
        self.allocator: Any = None

    def word(self, tensor: int) -> int:
        """Index of a tensor's first word."""
        return (tensor - self.base) // 8

    def outside(self, tensor: int) -> int:
        """Keep ggml from allocating a tensor's data: its address is written before each step."""
        self.words[self.word(tensor) + self.at_data] = self.base  # any address but null
        return tensor

    def place_in(self, tensor: int, whole: int, offset: int) -> None:
        """Let an operation write its result into a part of another tensor."""
        at = self.word(tensor)
        self.words[at + self.at_view_source] = whole
        self.words[at + self.at_view_offset] = offset

    def persist(self, tensor: int) -> int:
        """Keep ggml from reusing a tensor's memory within the graph."""
        self.ggml.ggml_set_input(tensor)
        self.ggml.ggml_set_output(tensor)
        return tensor

    def allocate(self) -> None:
        """Allocate every tensor of the graph; raises GgmlUnavailable for an operation that the device lacks."""
        ggml = self.ggml
        try:
            self.device.check_graph(self.graph)
        except GgmlUnavailable:
            self.close()
            raise
        self.allocator = ggml.ggml_gallocr_new(self.device.buffer_type)
        if not ggml.ggml_gallocr_alloc_graph(self.allocator, self.graph):
            self.close()
            raise GenerationFailed("no memory for this step.", cure=MEMORY_CURE)
        self.byte_count += ggml.ggml_gallocr_get_buffer_size(self.allocator, 0)

    def compute(self, compute: Callable[[GraphMemory], int] | None = None) -> None:
        """Compute the graph by the backend's threads, or by a function that returns ggml's status."""
        for tensor, values in self._uploads:
            self.upload(tensor, values)
        if compute is not None:
            status = compute(self)
        else:
            status = self.ggml.ggml_backend_graph_compute(self.device.backend, self.graph)
        if status != 0:
            raise GenerationFailed(f"ggml could not compute a step (status {status}).", cure=MEMORY_CURE)
        for tensor, values in self._downloads:
            self.ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)

    def upload(self, tensor: int, values: npt.NDArray[Any]) -> None:
        self.ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def input(self, tensor: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """The array to write a tensor's values to before each step. Call after `allocate`."""
        return self._transferred(self._uploads, tensor, shape, dtype)

    def output(self, tensor: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """The array to read a tensor's values from after each step. Call after `allocate`."""
        return self._transferred(self._downloads, tensor, shape, dtype)

    def array(self, tensor: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """A tensor's data in host memory, without a copy; valid until `close`."""
        items, address = int(np.prod(shape)), int(self.words[self.word(tensor) + self.at_data])
        memory = (ctypes.c_uint8 * (items * np.dtype(dtype).itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def _transferred(self, transfers: _Transfers, tensor: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """A tensor's data, or for a card an array that is copied in each step."""
        if self.device.is_host:
            return self.array(tensor, shape, dtype)
        transfers.append((tensor, np.zeros(shape, dtype)))
        return transfers[-1][1]

    def close(self) -> None:
        """Free what ggml holds, once."""
        if self.allocator:
            self.ggml.ggml_gallocr_free(self.allocator)
            self.allocator = None
        if self.context:
            self.ggml.ggml_free(self.context)
            self.context = None


@dataclass(frozen=True, slots=True)
class MaskSlot:
    """A graph's mask of one span and window, with its row count and its tensor's first word."""

    span: int
    window: int
    rows: int  # at least the span's tokens
    word: int


@dataclass
class SlotTensors:
    """Word indices, by layer and span, of the fields that place sessions' rows, in the order of `SlotPatches.write`."""

    key_count: list[list[int]] = field(default_factory=list)
    value_count: list[list[int]] = field(default_factory=list)
    key_data: list[list[int]] = field(default_factory=list)
    value_data: list[list[int]] = field(default_factory=list)
    key_written: list[list[int]] = field(default_factory=list)
    value_written: list[list[int]] = field(default_factory=list)
    key_target: list[list[int]] = field(default_factory=list)  # destination tensors of the copies, which cards read
    value_target: list[list[int]] = field(default_factory=list)
    masks: list[MaskSlot] = field(default_factory=list)

    def fields(self) -> list[list[list[int]]]:
        counts, data = [self.key_count, self.value_count], [self.key_data, self.value_data]
        return [*counts, *data, self.key_written, self.value_written, self.key_target, self.value_target]

    def add_layer(self) -> None:
        for each in self.fields():
            each.append([])


class SlotPatches:
    """Writes the places of a step's session rows into a graph's tensors."""

    def __init__(
        self, memory: GraphMemory, slots: SlotTensors, windows: Sequence[int], *, row_bytes: int, areas: int
    ) -> None:
        """`windows` of the slice's layers, 0 for none; `areas` of each layer: 2, or 1 if V is a part of K."""
        self._memory = memory
        self._row_bytes = row_bytes
        self._masks = slots.masks
        self._mask_memory: list[npt.NDArray[np.uint16]] = []  # held until the step is computed
        self._mask_on_card: dict[int, DeviceMemory] = {}  # by its tensor's word
        self._windows = np.array([window or NO_WINDOW for window in windows], np.int64)[:, None]
        self._areas = areas * np.arange(len(windows), dtype=np.int64)[:, None]
        self._value_area = areas - 1  # after K's
        self._is_host = memory.device.is_host
        self._fields = np.array(slots.fields()[: 6 if self._is_host else 8], np.int64)
        # on a card an address alone does not tell which buffer it is in
        self._buffer_fields = self._fields[2:] - memory.at_data + memory.at_buffer
        self._values = np.empty(self._fields.shape, np.int64)

    def write(self, spans: Sequence[SpanRows]) -> None:
        """Write the places for the spans of a step, in their order."""
        address = np.array([span.address for span in spans], np.int64)
        area_bytes = np.array([span.area_bytes for span in spans], np.int64)
        first = np.array([span.first_position for span in spans], np.int64)
        end = first + np.array([span.token_count for span in spans], np.int64)
        # keys before all windows of a span are left out
        begin = np.maximum(first + 1 - self._windows, 0)
        keys = address + self._areas * area_bytes
        values = self._values
        values[:2] = end - begin
        values[2] = keys + begin * self._row_bytes
        values[3] = values[2] + self._value_area * area_bytes
        values[4] = keys + first * self._row_bytes
        values[5] = values[4] + self._value_area * area_bytes
        words = self._memory.words
        if not self._is_host:
            values[6:] = values[4:6]
            words[self._buffer_fields] = np.array([span.buffer for span in spans], np.uint64)
        words[self._fields] = values.view(np.uint64)
        if self._masks:
            self._mask_memory.clear()
            for mask in self._masks:
                self._write_mask(spans[mask.span], mask)

    def _write_mask(self, span: SpanRows, slot: MaskSlot) -> None:
        """Write which keys each row of a span attends to, float16 [rows, keys]: 0 or minus infinity."""
        memory, first, end = self._memory, span.first_position, span.first_position + span.token_count
        window, at = slot.window or NO_WINDOW, slot.word
        begin = max(0, first + 1 - window)
        query_position = np.arange(first, end)[:, None]
        key_position = np.arange(begin, end)[None]
        masked = key_position > query_position
        if end > window:
            masked |= key_position <= query_position - window
        mask = np.zeros((slot.rows, end - begin), np.uint16)
        mask[: span.token_count] = masked * ROW_MASKED
        self._mask_memory.append(mask)
        memory.words[at + memory.at_sizes] = end - begin
        row_bytes = 2 * (end - begin)
        memory.words[at + memory.at_strides + 1] = row_bytes
        memory.words[at + memory.at_strides + 2 : at + memory.at_strides + 4] = row_bytes * slot.rows
        if self._is_host:
            memory.words[at + memory.at_data] = mask.ctypes.data
            return
        held = self._mask_on_card.get(at)
        if held is None or held.byte_count < mask.nbytes:
            held = self._mask_on_card[at] = DeviceMemory(memory.device, 2 * mask.nbytes)
        memory.words[at + memory.at_data], memory.words[at + memory.at_buffer] = held.address, held.buffer
        memory.upload(memory.base + 8 * at, mask)
