"""Loads ggml with kernels that this processor can run, and gives its devices and their memory.

Two kinds of builds are accepted: one with its kernels in `libggml-cpu.so`, compiled on this machine (`make setup`), and
one with a kernel library for each kind of processor, of which the best is chosen here (both images). The processor's
flags are checked before any call into ggml: an unsupported instruction would end the process with SIGILL.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from noodle.errors import GenerationFailed, GgmlUnavailable

log = logging.getLogger(__name__)

CPU = "CPU"  # ggml's name of the device that computes in this process's memory
CPUINFO = Path("/proc/cpuinfo")
USE_TRANSFORMERS = "or leave NOODLE_EXECUTOR at auto or transformers"
BUILD_CURE = (
    "Run `make ggml` on a machine with a C++ compiler (about a minute), use noodle's images, which include ggml, "
    f"{USE_TRANSFORMERS}."
)
X86 = ("x86_64", "amd64")
# ggml's functions that tell which instructions it was compiled for, and the processor flag that each one needs
NEEDED_FLAGS = {
    "ggml_cpu_has_avx2": "avx2",
    "ggml_cpu_has_fma": "fma",
    "ggml_cpu_has_f16c": "f16c",
    "ggml_cpu_has_bmi2": "bmi2",
    "ggml_cpu_has_avx_vnni": "avx_vnni",
    "ggml_cpu_has_avx512": "avx512f",
    "ggml_cpu_has_avx512_vbmi": "avx512vbmi",
    "ggml_cpu_has_avx512_vnni": "avx512_vnni",
    "ggml_cpu_has_avx512_bf16": "avx512_bf16",
    "ggml_cpu_has_amx_int8": "amx_int8",
}

_lock = threading.Lock()
_loaded: GgmlLibrary | None = None


@dataclass(frozen=True, slots=True)
class GgmlLibrary:
    """ggml, loaded once per process; `module` is the package's flat module of C functions."""

    module: Any
    version: str  # of the package and of ggml: "0.0.45 (ggml 0.15.3)"
    kernels: str  # "native", or the kind of processor, as in "zen4"
    _callbacks: tuple[Any, ...]  # C holds pointers to these without a Python reference

    @property
    def devices(self) -> tuple[str, ...]:
        """ggml's names of the devices of this build, such as CPU, CUDA0 or Vulkan0."""
        ggml = self.module
        found = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
        return tuple(ggml.ggml_backend_dev_name(device).decode() for device in found)

    def backend(self, threads: int, device: str = CPU) -> Any:
        """Make a backend for one slice; its owner frees it (ggml_backend_free). `threads` applies to the CPU.

        Raises GgmlUnavailable if this build has no such device.
        """
        ggml = self.module
        found = ggml.ggml_backend_dev_by_name(device.encode())
        backend = ggml.ggml_backend_dev_init(found, None) if found else None
        if not backend:
            raise GgmlUnavailable(
                f"this ggml finds no device {device}; it has {', '.join(self.devices) or 'none'}.",
                cure="Build ggml with the flag of that device (GGML_CMAKE_ARGS), and install the device's driver.",
            )
        self.set_threads(backend, threads)
        return backend

    def card(self, name: str) -> tuple[str, int]:
        """Description and free bytes of a device."""
        ggml = self.module
        device = ggml.ggml_backend_dev_by_name(name.encode())
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return ggml.ggml_backend_dev_description(device).decode(), free.value

    def set_threads(self, backend: Any, threads: int) -> None:
        """Set the threads of a backend for its next graphs; cards ignore it."""
        ggml = self.module
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
        address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)


@dataclass(frozen=True, slots=True)
class GgmlDevice:
    """The device that a slice computes on, with the slice's own backend.

    All devices except the CPU are alike here (CUDA, Vulkan): their memory is allocated in buffers and accessed by
    copies.
    """

    ggml: Any
    name: str  # ggml's: CPU, CUDA0, Vulkan0
    backend: Any

    @property
    def is_host(self) -> bool:
        """Whether the device computes in this process's memory."""
        return self.name == CPU

    @property
    def buffer_type(self) -> Any:
        return self.ggml.ggml_backend_get_default_buffer_type(self.backend)

    def multiplies(self, type_number: int) -> bool:
        """Whether the device multiplies by matrices of a type, given ggml's number of it."""
        ggml = self.ggml
        if not 0 <= type_number < ggml.GGML_TYPE_COUNT or ggml.ggml_blck_size(type_number) <= 0:
            return False
        if self.is_host:
            traits = ggml.ggml_type_traits_cpu.from_address(ggml.ggml_get_type_traits_cpu(type_number))
            return bool(traits.vec_dot)
        length = 32 * ggml.ggml_blck_size(type_number)
        size = 4 * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))
        try:
            weight = ggml.ggml_new_tensor_2d(context, type_number, length, 32)
            rows = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, length, 1)
            product = ggml.ggml_mul_mat(context, weight, rows)
            return bool(ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_get_device(self.backend), product))
        finally:
            ggml.ggml_free(context)

    def check_graph(self, graph: Any) -> None:
        """Raise GgmlUnavailable for an operation that a card does not support: ggml would end the process."""
        if self.is_host:
            return
        device = self.ggml.ggml_backend_get_device(self.backend)
        for index in range(self.ggml.ggml_graph_n_nodes(graph)):
            node = self.ggml.ggml_graph_node(graph, index)
            if not self.ggml.ggml_backend_dev_supports_op(device, node):
                operation = self.ggml.ggml_op_desc(node).decode()
                raise GgmlUnavailable(
                    f"{self.name} does not support {operation} as this model needs it.",
                    cure="Set NOODLE_EXECUTOR=transformers on this stage, or NOODLE_DEVICE=cpu.",
                )


class DeviceMemory:
    """Memory of a card, freed with this object. Raises GenerationFailed if the card has too little left."""

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
        self._ggml.ggml_backend_buffer_clear(self.buffer, byte)

    def copy_from(self, source: DeviceMemory, from_offset: int, to_offset: int, byte_count: int) -> None:
        """Copy bytes from other memory of the same card."""
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


def load_ggml() -> GgmlLibrary:
    """Load ggml on the first call. Raises GgmlUnavailable with the reason and the cure."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load(folder_of_libraries(), processor_flags())
        return _loaded


def keep_float32_on_cards() -> None:
    """Make ggml's cards compute float32 without reduced precision, for NOODLE_QUALITY=exact. Call before `load_ggml`.

    Vulkan's kernels multiply float32 in 16 bits on cards that support it, whatever precision an operation requests. The
    default model's logits were then off by 0.02, and by 0.00003 with this setting.
    """
    os.putenv("GGML_VK_DISABLE_F16", "1")  # read by C alone


def ggml_version() -> str:
    """Version of the installed package, empty if none is installed. Loads nothing."""
    try:
        return importlib.metadata.version("ggml-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def ggml_build() -> str:
    """Identify the installed build by its libraries' time, as its switches change its speed; empty without one."""
    try:
        built = max((path.stat().st_mtime for path in folder_of_libraries().glob("lib*.so")), default=0.0)
    except (GgmlUnavailable, OSError):
        return ""
    return f"{int(built):x}" if built else ""


def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str] | None:
    """Linux's flags of this x86 processor; None if they are unknown or the processor is not x86."""
    if platform.machine().lower() not in X86:
        return None
    with contextlib.suppress(OSError):  # not Linux
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return None


def flags_digest() -> str:
    """A short digest of this processor's flags, for the key of what was measured on it; empty if they are unknown."""
    flags = processor_flags()
    return hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:12] if flags else ""


def check_processor(flags: frozenset[str] | None) -> None:
    """Raise GgmlUnavailable if this processor is known to be too old for ggml's kernels."""
    if flags is not None and "avx2" not in flags:
        raise GgmlUnavailable(
            "this machine's processor has no AVX2, which ggml's kernels need here (Intel since 2013, AMD since 2015).",
            cure="Set NOODLE_EXECUTOR=transformers, or leave it at auto: transformers then computes here.",
        )


def folder_of_libraries() -> Path:
    """Folder of ggml's libraries; raises GgmlUnavailable if ggml is not installed."""
    found = importlib.util.find_spec("ggml")
    if found is None or not found.submodule_search_locations:
        raise GgmlUnavailable("ggml is not installed here.", cure=BUILD_CURE)
    return Path(found.submodule_search_locations[0]) / "lib"


def _load(folder: Path, flags: frozenset[str] | None) -> GgmlLibrary:
    check_processor(flags)
    try:
        if (folder / "libggml-cpu.so").exists() or not list(folder.glob("libggml-cpu-*.so")):
            kernels, ggml = "native", importlib.import_module("ggml")
        else:
            best = _best_kernels(folder)
            kernels, ggml = best.stem.removeprefix("libggml-cpu-"), _import_with_kernels(folder.parent, best)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise GgmlUnavailable(f"ggml is installed but cannot be loaded: {error}.", cure=BUILD_CURE) from error
    lacking = sorted(
        flag
        for function, flag in NEEDED_FLAGS.items()
        if flags is not None and flag not in flags and getattr(ggml, function)()
    )
    if lacking:
        raise GgmlUnavailable(
            f"this ggml was built for another processor: it uses {', '.join(lacking)}, which this processor lacks.",
            cure=f"Build it here (`make ggml`), {USE_TRANSFORMERS}.",
        )
    callbacks = _forward_log(ggml)
    if kernels != "native":
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
    if not ggml.ggml_backend_dev_by_name(CPU.encode()):
        raise GgmlUnavailable("this ggml has no backend for the CPU.", cure=BUILD_CURE)
    version = f"{ggml.__version__} (ggml {ggml.ggml_version().decode()})"
    log.info("loaded ggml %s with its %s kernels", version, kernels)
    return GgmlLibrary(ggml, version, kernels, callbacks)


def _best_kernels(folder: Path) -> Path:
    """The kernel library with the highest score on this processor; a score of 0 means that it cannot run here."""
    scores = {
        path: int(ctypes.CDLL(str(path)).ggml_backend_score()) for path in sorted(folder.glob("libggml-cpu-*.so"))
    }
    best = max(scores, key=lambda path: scores[path])
    if not scores[best]:
        names = ", ".join(path.stem.removeprefix("libggml-cpu-") for path in scores)
        raise GgmlUnavailable(f"none of this ggml's kernels ({names}) runs on this processor.", cure=BUILD_CURE)
    return best


def _import_with_kernels(package: Path, kernels: Path) -> Any:
    """Import the package ggml with the CPU functions of one kernel library.

    At import ggml/ggml.py looks up every C function, and the CPU's only in a `libggml-cpu.so`. This one module is
    therefore executed with its own `import ctypes`, in which functions missing from `libggml-base.so`, the library that
    the module searches last, are taken from the chosen kernels.
    """
    kernel_functions = ctypes.CDLL(str(kernels))

    class WithKernels(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(kernel_functions, name)

    def open_library(name: str, *arguments: Any, **options: Any) -> ctypes.CDLL:
        kind = WithKernels if Path(str(name)).name == "libggml-base.so" else ctypes.CDLL
        return kind(name, *arguments, **options)

    def import_module(name: str, *arguments: Any) -> Any:
        return own_ctypes if name == "ctypes" else builtins.__import__(name, *arguments)

    own_ctypes = SimpleNamespace(**{**vars(ctypes), "CDLL": open_library})
    spec = importlib.util.spec_from_file_location("ggml.ggml", package / "ggml.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{package / 'ggml.py'} is missing")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": import_module}
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.modules.pop("ggml", None)  # the module imports its package, which has copied no functions then
    return importlib.import_module("ggml")


def _forward_log(ggml: Any) -> tuple[Any, ...]:
    """Send ggml's log lines to our log, and the message with which it ends the process."""
    parts: list[str] = []

    def on_log(_level: int, text: bytes | None, _user_data: int | None) -> None:
        parts.append((text or b"").decode(errors="replace"))
        if parts[-1].endswith("\n"):
            line = "".join(parts).strip()
            parts.clear()
            log.debug("%s", line)

    def on_abort(message: bytes | None) -> None:
        log.critical("ggml ends this process: %s", (message or b"").decode(errors="replace"))

    callbacks = (ggml.ggml_log_callback(on_log), ggml.ggml_abort_callback_t(on_abort))
    ggml.ggml_log_set(callbacks[0], None)
    ggml.ggml_set_abort_callback(callbacks[1])
    return callbacks
