"""Chooses the device and dtype that a stage computes with and reads the free memory there, each with the reason.

torch is imported only for an NVIDIA card that transformers computes on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from noodle.errors import ConfigurationError, GgmlUnavailable
from noodle.metrics.machine import CGROUP, container_use, machine_use
from services.stage.executors.ggml.backend import load_ggml
from services.stage.executors.load import ggml_device

TORCH_DEVICES = ("cpu", "cuda")  # on any other device ggml alone computes
NVIDIA_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and its reason."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that a slice and its KV rows may take, and the source of the number."""

    free_bytes: int
    source: str


def choose_device(wanted: str, *, ggml_only: bool, has_torch: bool) -> Choice:
    """`cpu` or `cuda` for "auto", "cpu" or "cuda"; a device that only ggml has is used as named.

    `ggml_only`: transformers is not to compute here; `has_torch`: it is installed. Raises ConfigurationError if a
    requested card is missing, or if the installed torch cannot compute on the card.
    """
    if wanted not in ("auto", "cuda"):
        return Choice(wanted, "configured")
    if ggml_only or not has_torch:
        if wanted == "cuda" or ggml_has("cuda"):
            return Choice("cuda", "configured" if wanted == "cuda" else "ggml is built for the CUDA device")
        return Choice("cpu", "this ggml finds no CUDA device")
    if wanted == "auto" and not NVIDIA_DRIVER.exists():
        return Choice("cpu", "no NVIDIA driver found")
    from services.stage.executors.transformers.runtime import choose_cpu_or_card

    return Choice(*choose_cpu_or_card(wanted))


def ggml_has(device: str) -> bool:
    """Whether ggml is installed and has a device of this kind."""
    try:
        ggml_device(device)
    except GgmlUnavailable:
        return False
    return True


def is_for_ggml(model: Path, only_ggml: str) -> bool:
    """Whether ggml computes this file unless transformers is asked for: a GGUF file, if ggml is installed here.

    `only_ggml` says that transformers does not compute it; empty if it does.
    """
    return bool(only_ggml) or (model.is_file() and ggml_has("cpu"))


def choose_dtype(wanted: str, device: str) -> Choice:
    """float32, float16 or bfloat16 for "auto" or one of these; on a card bfloat16 only if it is native there."""
    if device == "cuda":
        from services.stage.executors.transformers.runtime import choose_card_dtype

        return Choice(*choose_card_dtype(wanted))
    return Choice("float32", "exact on a CPU") if wanted == "auto" else Choice(wanted, "configured")


def device_name(device: str, executor: str) -> str:
    """Name of the device's model, for people and for the key of its measurements."""
    if device == "cuda" and executor == "transformers":
        from services.stage.executors.transformers.runtime import card_name

        return card_name()
    if device != "cpu":
        return ggml_card(device)[0]
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"


def free_memory(device: str, executor: str, *, cgroup: Path = CGROUP) -> FreeMemory:
    """Free memory for a slice on a device that an executor computes on.

    On a CPU this is what the system has available, or what the container's limit leaves if that is less.
    """
    if device == "cuda" and executor == "transformers":
        from services.stage.executors.transformers.runtime import free_card_bytes

        return FreeMemory(free_card_bytes(), "the card's driver")
    if device != "cpu":
        return FreeMemory(ggml_card(device)[1], "the card's driver, by ggml")
    machine = machine_use()
    if machine is None:
        raise ConfigurationError(
            "This system does not report its available memory.", cure="Run the stage on Linux, or in its container."
        )
    candidates = [FreeMemory(machine.available_bytes, "available on the system")]
    container = container_use(cgroup)
    if container.memory_limit_bytes is not None and container.memory_bytes is not None:
        source = f"the container's memory limit (cgroup v{container.cgroup_version})"
        candidates.append(FreeMemory(max(0, container.memory_limit_bytes - container.memory_bytes), source))
    return min(candidates, key=lambda memory: memory.free_bytes)


def ggml_card(device: str) -> tuple[str, int]:
    """Description and free bytes of ggml's card of a kind; raises ConfigurationError if there is none."""
    try:
        return load_ggml().card(ggml_device(device))
    except GgmlUnavailable as error:
        raise ConfigurationError(f"NOODLE_DEVICE={device}, but {error}") from error
