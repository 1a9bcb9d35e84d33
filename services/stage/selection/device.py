"""Where a stage computes, in which number format, and how much memory is free there; each answer with its reason.

The few calls to CUDA stand behind `torch.cuda`, which is handed in, so that this can be tried without a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from noodle.errors import ConfigurationError, GgmlUnavailable
from noodle.metrics.machine import container_use
from noodle.metrics.scraped import CardUse

DTYPES = ("float32", "float16", "bfloat16")
TORCH_DEVICES = ("cpu", "cuda")  # on any other ggml alone computes
NEWEST_OF_CU126 = (9, 0)  # the newest cards that wheels of that index have kernels for


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and why it is that."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that a slice and its KV rows may take, and where the number comes from."""

    free_bytes: int
    source: str


def choose_device(wanted: str, torch: Any) -> Choice:
    """`cpu` or `cuda` for "auto", "cpu" or "cuda"; a device that only ggml has is taken by name alone.

    Raises ConfigurationError when a card is asked for and missing, or there is one that this torch can not compute on.
    """
    if wanted == "cpu" or wanted not in ("auto", *TORCH_DEVICES):
        return Choice(wanted, "configured")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise ConfigurationError(
                "NOODLE_DEVICE=cuda, but torch finds no CUDA device.",
                cure="Use the image of Dockerfile.gpu with the NVIDIA container toolkit, or set NOODLE_DEVICE=cpu.",
            )
        return Choice("cpu", "no CUDA device is there")
    capability: tuple[int, int] = torch.cuda.get_device_capability()
    kernels: list[str] = torch.cuda.get_arch_list()
    if not _has_kernels_for(capability, kernels):
        raise ConfigurationError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, but this torch "
            f"{torch.__version__} was built for {', '.join(kernels) or 'no card'}.",
            cure=f"Use {_image_for(capability)}, or set NOODLE_DEVICE=cpu.",
        )
    reason = "configured" if wanted == "cuda" else "a CUDA device is there that this torch has kernels for"
    return Choice("cuda", reason)


def choose_dtype(wanted: str, device: str, torch: Any) -> Choice:
    """float32, float16 or bfloat16 for "auto" or one of these; bfloat16 only where a card has it itself."""
    if device != "cuda":
        if wanted != "auto":
            return Choice(wanted, "configured")
        return Choice("float32", "a CPU, where it is exact")
    # by default torch also counts emulation, which is slower than float32
    has_bfloat16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if wanted == "bfloat16" and not has_bfloat16:
        raise ConfigurationError(
            f"NOODLE_DTYPE=bfloat16, but {torch.cuda.get_device_name()} only emulates it.",
            cure="Set NOODLE_DTYPE=float16, or leave it at auto.",
        )
    if wanted != "auto":
        return Choice(wanted, "configured")
    if has_bfloat16:
        return Choice("bfloat16", "this card computes with it natively")
    return Choice("float16", "this card has no bfloat16; float16 halves the memory and sums are kept in float32")


def device_name(device: str, torch: Any) -> str:
    """What the device calls itself."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    if device not in TORCH_DEVICES:
        return ggml_card(device).description
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return "CPU"  # not Linux: the name is for people and for the measurements' key only
    return "CPU"


def card_use(torch: Any) -> CardUse | None:
    """The card now; how busy and how warm it is where its driver's own library tells (the package nvidia-ml-py).

    None when the card has failed: the stage's steps say why, and its other metrics are needed then most.
    """
    try:
        free_bytes, memory_bytes = torch.cuda.mem_get_info()
    except RuntimeError:
        return None
    busy_percent, celsius = _told(torch.cuda.utilization), _told(torch.cuda.temperature)
    busy_share = None if busy_percent is None else busy_percent / 100
    return CardUse(device_name("cuda", torch), int(memory_bytes), int(free_bytes), busy_share, celsius)


def _told(ask: Callable[[], float]) -> float | None:
    """What the driver answers, None where it does not."""
    try:
        return float(ask())
    except Exception:  # noqa: BLE001  # whatever a driver raises, the other metrics are told without this one
        return None


def free_memory(device: str, torch: Any, *, cgroup: Path = Path("/sys/fs/cgroup")) -> FreeMemory:
    """Free bytes of the memory that a slice on `device` lives in.

    On a CPU what the system can still give, or what the container's limit leaves if that is less.
    """
    if device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return FreeMemory(int(free_bytes), "the card's driver")
    if device not in TORCH_DEVICES:
        return FreeMemory(ggml_card(device).free_bytes, "the card's driver, by ggml")
    candidates = [FreeMemory(psutil.virtual_memory().available, "MemAvailable of the system")]
    container = container_use(cgroup)
    if container.memory_limit_bytes is not None and container.memory_bytes is not None:
        free_bytes = max(0, container.memory_limit_bytes - container.memory_bytes)
        source = f"the container's memory limit (cgroup v{container.cgroup_version})"
        candidates.append(FreeMemory(free_bytes, source))
    return min(candidates, key=lambda memory: memory.free_bytes)


@dataclass(frozen=True, slots=True)
class GgmlCard:
    """What ggml's driver says of a card that torch does not know."""

    description: str
    free_bytes: int


def ggml_card(device: str) -> GgmlCard:
    """The card that ggml computes on; raises ConfigurationError when there is none of that kind."""
    from services.stage.executors.ggml.backend import load_ggml
    from services.stage.executors.load import ggml_device

    try:
        name, library = ggml_device(device), load_ggml()
    except GgmlUnavailable as error:
        raise ConfigurationError(f"NOODLE_DEVICE={device}, but {error}") from error
    return GgmlCard(*library.card(name))


def free_memory_bytes(device: str, torch: Any) -> int:
    """Free bytes of the memory that a slice on `device` lives in."""
    return free_memory(device, torch).free_bytes


def _image_for(capability: tuple[int, int]) -> str:
    """Which image has kernels for a card, in words."""
    if capability <= NEWEST_OF_CU126:
        return "the image of Dockerfile.gpu as it is (torch 2.14.1 from the cu126 index is the last one for Pascal)"
    return (
        "the image of Dockerfile.gpu with torch from a newer index (in .env: TORCH_GPU_INDEX_URL="
        f"https://download.pytorch.org/whl/cu130 and TORCH_KERNELS=sm_{capability[0]}{capability[1]})"
    )


def _has_kernels_for(capability: tuple[int, int], kernels: Iterable[str]) -> bool:
    """Whether binary code or PTX in the list runs on a card.

    Binary code runs on cards of its major version from its own minor one up, PTX on every later card.
    """
    major, minor = capability
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1] or 0), int(digits[-1]))
        is_specific = digits != number  # as sm_90a: for that card alone
        if kind == "sm" and built[0] == major and built[1] <= minor and (not is_specific or built[1] == minor):
            return True
        if kind == "compute" and built <= (major, minor) and not is_specific:
            return True
    return False
