"""What ggml computes on: the machine's own memory, or a card with memory of its own; knows bytes, no rows, no layers.

All of ggml's devices but the CPU are alike here (CUDA, Vulkan): their memory is had in buffers, and reached by copies.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from noodle.errors import GenerationFailed, GgmlUnavailable

CPU = "CPU"


@dataclass(frozen=True, slots=True)
class GgmlDevice:
    """A device that a slice computes on, with a backend of the slice's own."""

    ggml: Any
    name: str  # ggml's own: CPU, CUDA0, Vulkan0
    backend: Any

    @property
    def is_host(self) -> bool:
        """Whether it computes in this process's memory."""
        return self.name == CPU

    @property
    def buffer_type(self) -> Any:
        """Of what its memory is had in."""
        return self.ggml.ggml_backend_get_default_buffer_type(self.backend)

    def check_graph(self, graph: Any) -> None:
        """Raise GgmlUnavailable for an operation that a card does not have: ggml would end the process."""
        if self.is_host:
            return
        device = self.ggml.ggml_backend_get_device(self.backend)
        for index in range(self.ggml.ggml_graph_n_nodes(graph)):
            node = self.ggml.ggml_graph_node(graph, index)
            if not self.ggml.ggml_backend_dev_supports_op(device, node):
                operation = self.ggml.ggml_op_desc(node).decode()
                raise GgmlUnavailable(
                    f"{self.name} has no {operation} as this model needs it.",
                    cure="Set NOODLE_EXECUTOR=transformers on this stage, or NOODLE_DEVICE=cpu.",
                )


class DeviceMemory:
    """Some of a card's memory; freed with this object. Raises GenerationFailed when there is not so much."""

    def __init__(self, device: GgmlDevice, byte_count: int) -> None:
        ggml = self._ggml = device.ggml
        self.byte_count = byte_count
        self.buffer = ggml.ggml_backend_buft_alloc_buffer(device.buffer_type, max(1, byte_count))
        if not self.buffer:
            raise GenerationFailed(
                f"{device.name} has no {byte_count} bytes of memory left.",
                cure="Give this stage fewer layers (NOODLE_SPLIT), less KV cache (NOODLE_KV_BYTES) or fewer bits "
                "(NOODLE_WEIGHTS).",
            )
        self.address = int(ggml.ggml_backend_buffer_get_base(self.buffer) or 0)
        weakref.finalize(self, ggml.ggml_backend_buffer_free, self.buffer)

    def fill(self, byte: int) -> None:
        """Let every byte be this one."""
        self._ggml.ggml_backend_buffer_clear(self.buffer, byte)

    def copy_from(self, source: DeviceMemory, from_offset: int, to_offset: int, byte_count: int) -> None:
        """Copy bytes of another piece of the same card's memory."""
        if not byte_count:
            return
        ggml = self._ggml
        size = 2 * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))
        try:
            ends = []
            for memory, offset in ((source, from_offset), (self, to_offset)):
                tensor = ggml.ggml_new_tensor_1d(context, ggml.GGML_TYPE_I8, byte_count)
                ggml.ggml_backend_tensor_alloc(memory.buffer, tensor, memory.address + offset)
                ends.append(tensor)
            ggml.ggml_backend_tensor_copy(*ends)
        finally:
            ggml.ggml_free(context)
