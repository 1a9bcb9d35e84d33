"""The threads that compute a slice's graphs: noodle's own pool, or ggml's if most of a graph is ggml's products."""

from __future__ import annotations

import ctypes

from services.stage.executors.ggml.backend import GgmlDevice, load_ggml
from services.stage.executors.ggml.graph import GraphMemory
from services.stage.executors.ggml.kernels.library import own_library

# of a graph's multiplications: with a larger share of ggml's own, one thread for these would cost more than it spares
LARGEST_GGML_SHARE = 0.1


class GraphThreads:
    """Computes graphs of one backend with a number of threads that can change between graphs.

    The pool (kernels/pool.c) computes noodle's operations alone: ggml's are computed by one thread there.
    """

    def __init__(self, device: GgmlDevice, threads: int) -> None:
        self._device, self._threads = device, threads
        self._backend_threads = threads
        library = own_library() if device.is_host else None
        self._compute_graph = None
        if library is not None and hasattr(library, "noodle_compute_graph"):
            compute_graph = library.noodle_compute_graph
            compute_graph.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
            compute_graph.restype = ctypes.c_int
            self._compute_graph = compute_graph
            self._compute_by_ggml = ctypes.cast(load_ggml().module.ggml_backend_graph_compute, ctypes.c_void_p)

    def set(self, threads: int) -> None:
        self._threads = threads
        self._set_backend(threads)

    def compute(self, memory: GraphMemory) -> int:
        """Compute an allocated graph; returns ggml's status."""
        backend = self._device.backend
        all_work = memory.ggml_work + memory.own_work
        if self._compute_graph is None or memory.ggml_work > LARGEST_GGML_SHARE * all_work:
            self._set_backend(self._threads)
            return int(self._device.ggml.ggml_backend_graph_compute(backend, memory.graph))
        self._set_backend(1)
        return int(self._compute_graph(self._compute_by_ggml, backend, memory.graph, self._threads))

    def _set_backend(self, threads: int) -> None:
        if threads != self._backend_threads:
            load_ggml().set_threads(self._device.backend, threads)
            self._backend_threads = threads
