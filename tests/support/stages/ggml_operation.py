"""One operation of ggml over arrays, and the inputs of ggml's and noodle's kernels."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest

from noodle.model.ggml_types import GGML_TYPES
from services.stage.executors.ggml.backend import CPU, GgmlDevice, load_ggml, processor_flags
from services.stage.executors.ggml.graph import GgmlCalls, GraphMemory
from services.stage.executors.ggml.kernels.library import LIBRARY_NAME
from services.stage.executors.ggml.weights import quantize
from tests.support.stages.executors import need_ggml

# the processor's flags that kernels need
NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "fma", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
}


class Graph:
    """Operations of ggml over arrays."""

    def __init__(self, ggml, threads=1, tensor_count=32):
        self.ggml, self.backend = ggml, load_ggml().backend(threads)
        self.memory = GraphMemory(GgmlDevice(ggml, CPU, self.backend), tensor_count)
        self.given = []

    def stored(self, kind, stored, *sizes, strides=()):
        """Return a tensor over existing bytes; `strides` are those of its second and third axis."""
        ggml, memory = self.ggml, self.memory
        all_sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        tensor = memory.outside(
            ggml.ggml_new_tensor(memory.context, GGML_TYPES[kind.upper()].number, len(sizes), all_sizes)
        )
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
        return self.compute_all([(tensor, shape)])[0]

    def compute_all(self, results):
        """Return the arrays of several tensors, each given with its shape."""
        for tensor, _ in results:
            self.ggml.ggml_set_output(tensor)
            self.ggml.ggml_build_forward_expand(self.memory.graph, tensor)
        self.memory.allocate()
        for given, values in self.given:
            self.memory.array(given, values.shape, values.dtype)[...] = values
        self.memory.compute()
        found = [self.memory.array(tensor, shape, np.float32).copy() for tensor, shape in results]
        self.memory.close()
        self.ggml.ggml_backend_free(self.backend)
        return found


def ggml_calls():
    """Load ggml; skip the test if it is missing."""
    need_ggml()
    return GgmlCalls(load_ggml().module)


def needed(make, flags):
    """Return the kernels that `make` builds; skip if the processor lacks these flags or no kernels were built."""
    if not (processor_flags() or frozenset()) >= flags:
        pytest.skip(f"this processor has not all of {', '.join(sorted(flags))}")
    found = make()
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{LIBRARY_NAME} is needed in CI")
    if found is None:
        pytest.skip(f"{LIBRARY_NAME} was not built")
    return found


def stored_as(ggml, kind, values):
    """Return float32 numbers as ggml stores them in a type, and the float64 values that these bytes represent."""
    kind = GGML_TYPES[kind.upper()]
    stored = np.zeros(kind.byte_count(values.size), np.uint8)
    quantize(ggml, kind.number, np.ascontiguousarray(values), stored)
    meant = np.empty(values.shape, np.float32)
    traits = ggml.ggml_type_traits.from_address(ggml.ggml_get_type_traits(kind.number))
    to_float = ctypes.cast(traits.to_float, ctypes.c_void_p).value
    if to_float:
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(to_float)
        function(stored.ctypes.data, meant.ctypes.data, values.size)
    else:
        meant[...] = values
    return stored, meant.astype(np.float64)
