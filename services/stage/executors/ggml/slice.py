"""A slice computed by ggml (design D13): packed batches in, hidden states or logits out.

One thread at a time computes with a slice. Inputs for which ggml would end the process are refused first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from noodle.errors import WireError
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, SliceOutput, Span, checked_hidden_states
from services.stage.executors.ggml.backend import GgmlDevice
from services.stage.executors.ggml.graph import GraphMemory, SlotPatches, SlotTensors, SpanRows
from services.stage.executors.ggml.kernels.attention import BLOCK_TOKENS, StepSpans
from services.stage.executors.ggml.kernels.threads import GraphThreads
from services.stage.executors.ggml.kv_rows import DeviceRows, GgmlRows
from services.stage.executors.ggml.layers.graph import LayerGraph
from services.stage.executors.ggml.layers.operations import LAYER_TENSORS, SPAN_TENSORS, SliceTensors
from services.stage.executors.ggml.shape import ModelShape
from services.stage.executors.ggml.weights import GgmlTensors
from services.stage.executors.hidden_states import decode
from services.stage.executors.kv_cache import KvCache

Floats = npt.NDArray[np.float32]

# kept between steps: enough for every number of decoding sessions, and one chunk
MAXIMUM_GRAPHS = 96
MAXIMUM_GRAPH_BYTES = 256 << 20
# Of larger steps one graph is kept, until a smaller step comes: prompt chunks seldom have the same size, their graphs
# take megabytes, and building one takes little of such a step's time.
LARGE_STEP_TOKENS = 32

_GraphKey = tuple[bool, tuple[int, ...]]  # whether from token ids; the token count of each span, or of all of them


@dataclass
class _StepGraph:
    memory: GraphMemory
    patches: SlotPatches | StepSpans
    inputs: npt.NDArray[Any]  # token ids or hidden states
    positions: npt.NDArray[np.int32]
    output: Floats


@dataclass
class _HeadGraph:
    memory: GraphMemory
    inputs: Floats
    logits: Floats


_AnyGraph = TypeVar("_AnyGraph", _StepGraph, _HeadGraph)


class GgmlSlice(KvCache[GgmlRows]):
    """Layers [start_layer, end_layer) of one model; a `ModelSlice`."""

    dtype = "float32"  # of the hidden states that it sends

    def __init__(
        self,
        device: GgmlDevice,
        weights: GgmlTensors,
        tensors: SliceTensors,
        shape: ModelShape,
        *,
        threads: GraphThreads,
        start_layer: int,
        end_layer: int,
        bytes_read: int,
        weights_note: str = "",
    ) -> None:
        areas = (end_layer - start_layer) * shape.areas

        def new_rows(reserve_tokens: int) -> GgmlRows:
            if device.is_host:
                blocks = BLOCK_TOKENS if tensors.attention is not None else 1
                return GgmlRows(reserve_tokens, areas=areas, row_bytes=tensors.row_bytes, block_tokens=blocks)
            return DeviceRows(reserve_tokens, areas=areas, row_bytes=tensors.row_bytes, device=device)

        super().__init__(new_rows, kv_bytes_per_token=areas * tensors.row_bytes, reserves_upfront=not device.is_host)
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.is_first = start_layer == 0
        self.is_last = end_layer == shape.layer_count
        self.hidden_size = shape.hidden_size
        self.vocab_size = shape.vocab_size
        self.bytes_read = bytes_read  # from disk, as stored there
        self.weight_bytes = weights.byte_count
        self.weights_note = weights_note
        self._ggml = device.ggml
        self._device = device
        self._threads = threads
        self._weights = weights
        self._tensors = tensors
        self._shape = shape
        self._graphs: OrderedDict[_GraphKey, Any] = OrderedDict()
        self._graph_bytes = 0
        self._last_hidden: Floats = np.empty((0, self.hidden_size), np.float32)
        self._finalizer = weakref.finalize(self, _free, device, weights, self._graphs)

    def forward(self, batch: PackedBatch) -> SliceOutput:
        """See ModelSlice. Raises StepRefused without room for KV rows, PositionGap if earlier rows are missing."""
        total_tokens = sum(span.token_count for span in batch.spans)
        inputs = self._inputs(batch, total_tokens)
        rows = self._open(batch.spans)
        spans = [
            SpanRows(each.address, each.buffer, each.area_bytes, span.first_position, span.token_count)
            for each, span in zip(rows, batch.spans, strict=True)
        ]
        if total_tokens <= LARGE_STEP_TOKENS:
            self._drop_large()
        # noodle's attention reads the spans, which may therefore be others each time that a graph is computed
        counts = tuple(span.token_count for span in batch.spans) if self._tensors.attention is None else (total_tokens,)
        step = self._graph((inputs.ndim == 1, counts), self._new_step_graph)
        step.inputs[...] = inputs
        begin = 0
        for place in spans:
            end = begin + place.token_count
            step.positions[begin:end] = np.arange(place.first_position, place.first_position + place.token_count)
            begin = end
        step.patches.write(spans)
        step.memory.compute(self._threads.compute)
        for each, span in zip(rows, batch.spans, strict=True):
            each.length = max(each.length, span.first_position + span.token_count)
        if not self.is_last:
            return SliceOutput(
                hidden_states=ActivationTensor("float32", step.output.shape, self._bytes_of(step.output))
            )
        self._last_hidden = step.output.copy()  # the head's graph may take this one's place
        return SliceOutput(logits=self.logits_of(batch.logits_rows))

    def logits_of(self, rows: npt.NDArray[np.int64]) -> Floats:
        if not self.is_last or not len(rows) or not len(self._last_hidden):
            return np.empty((0, self.vocab_size), np.float32)
        graph = self._graph((False, (-len(rows),)), self._new_head_graph)  # a span never has fewer than 0 tokens
        graph.inputs[...] = self._last_hidden[rows]
        graph.memory.compute(self._threads.compute)
        return graph.logits.copy()

    def set_threads(self, threads: int) -> None:
        self._threads.set(threads)

    def synchronize(self) -> None:
        """Return at once: ggml's steps are complete when `forward` returns."""

    def close(self) -> None:
        """Free what ggml holds; the slice cannot compute after that."""
        self._finalizer()

    def _inputs(self, batch: PackedBatch, total_tokens: int) -> npt.NDArray[Any]:
        """Token ids int32 [tokens] or hidden states float32 [tokens, hidden_size], checked."""
        if self.is_first and batch.token_ids is not None:
            ids = batch.token_ids
            if len(ids) != total_tokens or (total_tokens and not 0 <= ids.min() <= ids.max() < self.vocab_size):
                raise WireError(
                    f"{len(ids)} token ids came for {total_tokens} tokens of a vocabulary of {self.vocab_size}."
                )
            return ids.astype(np.int32)
        return decode(checked_hidden_states(self, batch))

    def _bytes_of(self, output: Floats) -> memoryview:
        """A graph's output, in place; the slice lives as long as somebody holds this."""
        memory: Any = (ctypes.c_uint8 * output.nbytes).from_address(output.ctypes.data)
        memory.owner = self
        return np.frombuffer(memory, np.uint8).data

    def _open(self, spans: tuple[Span, ...]) -> list[GgmlRows]:
        """Rows of each span's session; nothing is reserved if one is refused."""
        if self._tensors.positions or self._tensors.query_scales:
            last = max(span.first_position + span.token_count for span in spans) - 1
            if last >= self._shape.maximum_positions:
                raise WireError(f"position {last} came, and this model has {self._shape.maximum_positions}.")
        return self.open_spans(spans)

    def _graph(self, key: _GraphKey, new: Callable[[_GraphKey], _AnyGraph]) -> _AnyGraph:
        """Return the kept graph of this key, or a new one."""
        found: _AnyGraph | None = self._graphs.get(key)
        if found is None:
            found = new(key)
            self._keep(key, found)
        else:
            self._graphs.move_to_end(key)
        return found

    def _new_step_graph(self, key: _GraphKey) -> _StepGraph:
        from_tokens, counts = key
        ggml, shape, tensors = self._ggml, self._shape, self._tensors
        layers = self.end_layer - self.start_layer
        layer_tensors = LAYER_TENSORS + 2 * shape.experts_per_token + SPAN_TENSORS * len(counts)
        memory = GraphMemory(self._device, 32 + layers * layer_tensors)
        build = LayerGraph(memory, shape, tensors, self.start_layer)
        tokens = sum(counts)
        positions = ggml.ggml_new_tensor_1d(memory.context, ggml.GGML_TYPE_I32, tokens)
        if from_tokens:
            inputs = ggml.ggml_new_tensor_1d(memory.context, ggml.GGML_TYPE_I32, tokens)
        else:
            inputs = ggml.ggml_new_tensor_2d(memory.context, ggml.GGML_TYPE_F32, self.hidden_size, tokens)
        for tensor in (positions, inputs):
            memory.persist(tensor)
        hidden = build.embed(inputs) if from_tokens else inputs
        if self.is_first:
            hidden = build.enter(hidden, positions)
        output = build.layers(hidden, positions, counts)
        ggml.ggml_set_output(output)
        # nothing reads them in a model without rotary or learned positions
        ggml.ggml_build_forward_expand(memory.graph, positions)
        ggml.ggml_build_forward_expand(memory.graph, output)
        memory.allocate()
        sizes, dtype = ((tokens,), "<i4") if from_tokens else ((tokens, self.hidden_size), "<f4")
        return _StepGraph(
            memory,
            build.spans or self._slot_patches(memory, build.slots),
            memory.input(inputs, sizes, dtype),
            memory.input(positions, (tokens,), "<i4"),
            memory.output(output, (tokens, self.hidden_size), "<f4"),
        )

    def _slot_patches(self, memory: GraphMemory, slots: SlotTensors) -> SlotPatches:
        windows = self._shape.windows[self.start_layer : self.end_layer]
        return SlotPatches(memory, slots, windows, row_bytes=self._tensors.row_bytes, areas=self._shape.areas)

    def _new_head_graph(self, key: _GraphKey) -> _HeadGraph:
        ggml, row_count = self._ggml, -key[1][0]
        memory = GraphMemory(self._device, 64)
        inputs = ggml.ggml_new_tensor_2d(memory.context, ggml.GGML_TYPE_F32, self.hidden_size, row_count)
        ggml.ggml_set_input(inputs)
        build = LayerGraph(memory, self._shape, self._tensors, self.start_layer)
        logits = build.head(inputs)
        ggml.ggml_set_output(logits)
        ggml.ggml_build_forward_expand(memory.graph, logits)
        memory.allocate()
        return _HeadGraph(
            memory,
            memory.input(inputs, (row_count, self.hidden_size), "<f4"),
            memory.output(logits, (row_count, self.vocab_size), "<f4"),
        )

    def _keep(self, key: _GraphKey, graph: _AnyGraph) -> None:
        """Keep a new graph; free large ones, and the least recently used ones beyond the limits."""
        if sum(key[1]) > LARGE_STEP_TOKENS:
            self._drop_large()
        self._graphs[key] = graph
        self._graph_bytes += graph.memory.byte_count
        while len(self._graphs) > 1 and (len(self._graphs) > MAXIMUM_GRAPHS or self._graph_bytes > MAXIMUM_GRAPH_BYTES):
            self._drop(next(iter(self._graphs)))

    def _drop_large(self) -> None:
        for key in [key for key in self._graphs if sum(key[1]) > LARGE_STEP_TOKENS]:
            self._drop(key)

    def _drop(self, key: _GraphKey) -> None:
        memory = self._graphs.pop(key).memory
        self._graph_bytes -= memory.byte_count
        memory.close()


def _free(device: GgmlDevice, weights: GgmlTensors, graphs: OrderedDict[_GraphKey, Any]) -> None:
    for graph in graphs.values():
        graph.memory.close()
    graphs.clear()
    weights.close()
    device.ggml.ggml_backend_free(device.backend)
