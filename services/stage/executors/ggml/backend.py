"""ggml as this machine has it: finds the package, loads the kernels that its processor can run, makes backends.

Two kinds of build are taken. One with its kernels in `libggml-cpu.so`, compiled for the machine it was built on
(`make setup`); and one with a library of kernels for each kind of processor, the best of which is chosen here (both
images). Knows no model. Nothing of ggml is called before the processor's flags were looked at: it would die of SIGILL.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.errors import GgmlUnavailable

log = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
USE_TRANSFORMERS = "or leave NOODLE_EXECUTOR at auto or transformers"
CURE_OF_A_BUILD = (
    f"Where a C++ compiler is, `make ggml` builds it in about a minute; the images have it; {USE_TRANSFORMERS}."
)
X86 = ("x86_64", "amd64")
# what a library was compiled to use, by the function that tells, and the processor's flag that it then must have
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
    """ggml, loaded once in a process; `module` is the package's own flat module of C functions."""

    module: Any
    version: str  # of the package and of ggml, as "0.0.45 (ggml 0.15.3)"
    kernels: str  # "native", or which of the libraries for kinds of processors, as "zen4"
    _callbacks: tuple[Any, ...]  # C holds these without a reference that Python knows of

    @property
    def devices(self) -> tuple[str, ...]:
        """What this build computes on, by ggml's own names: CPU, and perhaps CUDA0 or Vulkan0."""
        ggml = self.module
        found = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
        return tuple(ggml.ggml_backend_dev_name(device).decode() for device in found)

    def backend(self, threads: int, device: str = "CPU") -> Any:
        """A backend of its own for one slice, on a device by ggml's name; its owner frees it (ggml_backend_free).

        `threads` counts on the CPU alone. Raises GgmlUnavailable when this build has no such device.
        """
        ggml = self.module
        found = ggml.ggml_backend_dev_by_name(device.encode())
        backend = ggml.ggml_backend_dev_init(found, None) if found else None
        if not backend:
            raise GgmlUnavailable(
                f"this ggml finds no device {device}; it has {', '.join(self.devices) or 'none'}.",
                cure="Build it with that device's flag (GGML_CMAKE_ARGS), and see that its driver is there.",
            )
        self.set_threads(backend, threads)
        return backend

    def card(self, name: str) -> tuple[str, int]:
        """What a device by ggml's name calls itself, and its free bytes."""
        ggml = self.module
        device = ggml.ggml_backend_dev_by_name(name.encode())
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return ggml.ggml_backend_dev_description(device).decode(), free.value

    def set_threads(self, backend: Any, threads: int) -> None:
        """How many threads a backend computes with from its next graph on; a card ignores it."""
        ggml = self.module
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
        address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)


def load_ggml() -> GgmlLibrary:
    """ggml, loaded at the first call; raises GgmlUnavailable, which says what is missing and the cure."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load(folder_of_libraries(), processor_flags())
        return _loaded


def keep_float32_on_cards() -> None:
    """Let ggml's cards compute float32 as such, as NOODLE_QUALITY=exact asks; to be called before ggml is loaded.

    Vulkan's kernels multiply float32 in 16 bits where a card has them (no precision asked of an operation changes it):
    the default model's logits were then off by 0.02, and without by 0.00003.
    """
    os.putenv("GGML_VK_DISABLE_F16", "1")  # for C alone


def ggml_version() -> str:
    """Of the package that is installed, empty when none is; loads nothing."""
    try:
        return importlib.metadata.version("ggml-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def ggml_build() -> str:
    """Which build of its libraries is installed, by when they were made; empty when none is.

    The same version built again with other switches computes at another speed.
    """
    try:
        made = max((path.stat().st_mtime for path in folder_of_libraries().glob("lib*.so")), default=0.0)
    except (GgmlUnavailable, OSError):
        return ""
    return f"{int(made):x}" if made else ""


def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str] | None:
    """What this machine's x86 processor can do, by Linux's names; None where that is not told, or it is no x86."""
    if platform.machine().lower() not in X86:
        return None
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return None


def check_processor(flags: frozenset[str] | None) -> None:
    """Raise GgmlUnavailable when this processor is known to be too old for ggml's kernels."""
    if flags is not None and "avx2" not in flags:
        raise GgmlUnavailable(
            "this machine's processor has no AVX2, which ggml's kernels need here (Intel from 2013, AMD from 2015 on).",
            cure="Set NOODLE_EXECUTOR=transformers, or leave it at auto: then transformers computes here.",
        )


def folder_of_libraries() -> Path:
    """Where the package has them; raises GgmlUnavailable when it is not installed."""
    found = importlib.util.find_spec("ggml")
    if found is None or not found.submodule_search_locations:
        raise GgmlUnavailable("ggml is not installed here.", cure=CURE_OF_A_BUILD)
    return Path(found.submodule_search_locations[0]) / "lib"


def _load(folder: Path, flags: frozenset[str] | None) -> GgmlLibrary:
    check_processor(flags)
    try:
        if (folder / "libggml-cpu.so").exists() or not list(folder.glob("libggml-cpu-*.so")):
            kernels, ggml = "native", importlib.import_module("ggml")
        else:
            best = _best_kernels(folder)
            kernels, ggml = best.stem.removeprefix("libggml-cpu-"), _import_with_kernels(best)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise GgmlUnavailable(f"ggml is installed but can not be loaded: {error}.", cure=CURE_OF_A_BUILD) from error
    lacking = sorted(
        flag
        for function, flag in NEEDED_FLAGS.items()
        if flags is not None and flag not in flags and getattr(ggml, function)()
    )
    if lacking:
        raise GgmlUnavailable(
            f"this ggml was built for another processor: it uses {', '.join(lacking)}, which this one has not.",
            cure=f"Build it here (`make ggml`), {USE_TRANSFORMERS}.",
        )
    callbacks = _hear(ggml)
    if kernels != "native":
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
    if not ggml.ggml_backend_dev_by_name(b"CPU"):
        raise GgmlUnavailable("this ggml has no backend for the CPU.", cure=CURE_OF_A_BUILD)
    version = f"{ggml.__version__} (ggml {ggml.ggml_version().decode()})"
    log.info("ggml %s is here, with its %s kernels", version, kernels)
    return GgmlLibrary(ggml, version, kernels, callbacks)


def _best_kernels(folder: Path) -> Path:
    """The library of kernels that scores highest on this processor, by its own word; 0 is that it can not run."""
    scores: dict[Path, int] = {}
    for path in sorted(folder.glob("libggml-cpu-*.so")):
        scores[path] = int(ctypes.CDLL(str(path)).ggml_backend_score())
    best = max(scores, key=lambda path: scores[path])
    if not scores[best]:
        names = ", ".join(path.stem.removeprefix("libggml-cpu-") for path in scores)
        raise GgmlUnavailable(f"none of this ggml's kernels ({names}) runs on this processor.", cure=CURE_OF_A_BUILD)
    return best


def _import_with_kernels(kernels: Path) -> Any:
    """The package, whose module looks up all of ggml's functions as it is imported, those of the CPU's kernels too.

    It knows these only in a `libggml-cpu.so`. So for the time of the import, what is not found in `libggml-base.so`,
    which it looks into after `libggml.so`, is looked up in the chosen library.
    """

    class WithKernels(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(of_the_processor, name)

    def open_library(name: str, *arguments: Any, **options: Any) -> ctypes.CDLL:
        kind = WithKernels if Path(str(name)).name == "libggml-base.so" else usual
        return kind(name, *arguments, **options)

    usual, of_the_processor = ctypes.CDLL, ctypes.CDLL(str(kernels))
    ctypes.CDLL = open_library  # type: ignore[assignment, misc]  # the package has no other way to be told
    try:
        return importlib.import_module("ggml")
    finally:
        ctypes.CDLL = usual  # type: ignore[misc]


def _hear(ggml: Any) -> tuple[Any, ...]:
    """Let ggml's log lines into ours, and what it says before it ends the process."""
    parts: list[str] = []

    def hear(_level: int, text: bytes | None, _user_data: int | None) -> None:
        parts.append((text or b"").decode(errors="replace"))
        if parts[-1].endswith("\n"):
            line = "".join(parts).strip()
            parts.clear()
            log.debug("%s", line)

    def hear_the_end(message: bytes | None) -> None:
        log.critical("ggml ends this process: %s", (message or b"").decode(errors="replace"))

    callbacks = (ggml.ggml_log_callback(hear), ggml.ggml_abort_callback_t(hear_the_end))
    ggml.ggml_log_set(callbacks[0], None)
    ggml.ggml_set_abort_callback(callbacks[1])
    return callbacks
