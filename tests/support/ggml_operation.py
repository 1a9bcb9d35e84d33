"""One operation of ggml over arrays."""

from __future__ import annotations

import ctypes

import numpy as np

from services.stage.ggml_device import CPU, GgmlDevice
from services.stage.ggml_graph import GraphMemory
from services.stage.ggml_library import load_ggml
from services.stage.ggml_weights import TYPE_NUMBERS


class Graph:
    """One operation of ggml over arrays."""

    def __init__(self, ggml, threads=1):
        self.ggml, self.backend = ggml, load_ggml().backend(threads)
        self.memory = GraphMemory(GgmlDevice(ggml, CPU, self.backend), 32)
        self.given = []

    def stored(self, kind, stored, *sizes, strides=()):
        """A tensor whose bytes are somewhere already; `strides` are those of its second and third axis."""
        ggml, memory = self.ggml, self.memory
        all_sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        tensor = memory.outside(ggml.ggml_new_tensor(memory.context, TYPE_NUMBERS[kind], len(sizes), all_sizes))
        at = memory.word(tensor)
        memory.words[at + memory.at_data] = stored.ctypes.data
        for axis, stride in enumerate(strides, 1):
            memory.words[at + memory.at_strides + axis] = stride
        return tensor

    def input(self, values):
        kind = self.ggml.GGML_TYPE_I32 if values.dtype == np.int32 else self.ggml.GGML_TYPE_F32
        tensor = self.ggml.ggml_new_tensor(
            self.memory.context, kind, values.ndim, (ctypes.c_int64 * values.ndim)(*reversed(values.shape))
        )
        self.ggml.ggml_set_input(tensor)
        self.ggml.ggml_set_output(tensor)
        self.given.append((tensor, values))
        return tensor

    def compute(self, tensor, shape):
        self.ggml.ggml_set_output(tensor)
        self.ggml.ggml_build_forward_expand(self.memory.graph, tensor)
        self.memory.allocate()
        for given, values in self.given:
            self.memory.array(given, values.shape, values.dtype)[...] = values
        self.memory.compute()
        found = self.memory.array(tensor, shape, np.float32).copy()
        self.memory.close()
        self.ggml.ggml_backend_free(self.backend)
        return found
