"""Weights in ggml's repacked layouts, which llama.cpp uses on CPUs for the types that have one."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from services.stage.executors.ggml.backend import GgmlDevice
from services.stage.executors.ggml.graph import GraphMemory
from services.stage.executors.ggml.weights import TensorLayout, WeightBlock

NAME = b"CPU_REPACK"
_EXTRA_TYPES = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)


def repacked(device: GgmlDevice, block: WeightBlock) -> list[int] | None:
    """Return tensors with the block's matrices in ggml's layout for the type; None if it has none here.

    They are freed with the block.
    """
    kind = repacked_buffer_type(device)
    if kind is None:
        return None
    ggml, memory = device.ggml, GraphMemory(device, 16 + 4 * len(block.tensors))
    weights = [ggml.ggml_new_tensor_2d(memory.context, layout.type_number, *layout.sizes) for layout in block.tensors]
    buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(memory.context, kind)
    if not buffer or not is_multiplied(device, weights[0], block.tensors[0]):
        free(ggml.ggml_backend_buffer_free, buffer, memory)
        return None
    for weight, layout in zip(weights, block.tensors, strict=True):
        values = block.bytes_of(layout)
        ggml.ggml_backend_tensor_set(weight, values.ctypes.data, 0, values.nbytes)
    weakref.finalize(block, free, ggml.ggml_backend_buffer_free, buffer, memory)
    return [int(weight) for weight in weights]


def repacked_buffer_type(device: GgmlDevice) -> int | None:
    """Return ggml's type of buffers that repack what is written into them."""
    ggml = device.ggml
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = _EXTRA_TYPES(address)(ggml.ggml_backend_reg_dev_get(registry, 0))
    index = 0
    while kinds[index]:
        if ggml.ggml_backend_buft_name(kinds[index]) == NAME:
            return int(kinds[index])
        index += 1
    return None


def is_multiplied(device: GgmlDevice, weight: int, layout: TensorLayout) -> bool:
    """Return whether ggml multiplies by a weight in such a buffer."""
    ggml, memory = device.ggml, GraphMemory(device, 16)
    rows = ggml.ggml_new_tensor_2d(memory.context, ggml.GGML_TYPE_F32, layout.sizes[0], 1)
    product = ggml.ggml_mul_mat(memory.context, weight, rows)
    supports = ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0), product)
    memory.close()
    return bool(supports)


def free(free_buffer: object, buffer: int, memory: GraphMemory) -> None:
    """Free the tensors and their data."""
    if buffer:
        free_buffer(buffer)  # type: ignore[operator]
    memory.close()


def addresses_of(graph: GraphMemory, layouts: Sequence[TensorLayout], block: WeightBlock) -> list[int]:
    """Return tensors of a graph on the block's matrices where they are."""
    weights = []
    for layout in layouts:
        weight = graph.outside(graph.ggml.ggml_new_tensor_2d(graph.context, layout.type_number, *layout.sizes))
        graph.words[graph.word(weight) + graph.at_data] = block.bytes_of(layout).ctypes.data
        weights.append(weight)
    return weights
