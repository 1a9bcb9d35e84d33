"""torch on this machine: its device, dtype, threads and memory; and transformers' reading of a model's config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from noodle.errors import ConfigurationError
from noodle.metrics.scraped import CardUse
from noodle.model.families import check_supported
from noodle.model.files import read_config

NEWEST_OF_CU126 = (9, 0)  # compute capability of the newest cards that wheels of that index have kernels for


def torch_version() -> str:
    return str(torch.__version__)


def set_threads(threads: int) -> None:
    """Set the number of threads that torch computes with on a CPU."""
    torch.set_num_threads(threads)


def read_model_config(folder: Path) -> Any:
    """transformers' config object; raises ModelNotFound, or UnsupportedModel for a model that noodle does not run."""
    check_supported(read_config(folder))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # transformers gets the values, and needs no package of the method
    return config


def choose_cpu_or_card(wanted: str) -> tuple[str, str]:
    """`cpu` or `cuda` for "auto" or "cuda", with the reason.

    Raises ConfigurationError if a requested card is missing, or if this torch cannot compute on the card.
    """
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise ConfigurationError(
                "NOODLE_DEVICE=cuda, but torch finds no CUDA device.",
                cure="Use the image of Dockerfile.gpu with the NVIDIA container toolkit, or set NOODLE_DEVICE=cpu.",
            )
        return "cpu", "no CUDA device found"
    capability: tuple[int, int] = torch.cuda.get_device_capability()
    kernels: list[str] = torch.cuda.get_arch_list()
    if not _has_kernels_for(capability, kernels):
        raise ConfigurationError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, but this torch "
            f"{torch.__version__} was built for {', '.join(kernels) or 'no card'}.",
            cure=f"Use {_image_for(capability)}, or set NOODLE_DEVICE=cpu.",
        )
    return "cuda", "configured" if wanted == "cuda" else "torch has kernels for the CUDA device"


def choose_card_dtype(wanted: str) -> tuple[str, str]:
    """The card's dtype for "auto" or a dtype, with the reason; bfloat16 only if the card supports it natively."""
    # by default torch also counts emulation, which is slower than float32
    has_bfloat16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if wanted == "bfloat16" and not has_bfloat16:
        raise ConfigurationError(
            f"NOODLE_DTYPE=bfloat16, but {card_name()} only emulates it.",
            cure="Set NOODLE_DTYPE=float16, or leave it at auto.",
        )
    if wanted != "auto":
        return wanted, "configured"
    if has_bfloat16:
        return "bfloat16", "this card computes with it natively"
    return "float16", "this card has no bfloat16; float16 halves the memory and sums are kept in float32"


def card_name() -> str:
    return str(torch.cuda.get_device_name())


def free_card_bytes() -> int:
    free_bytes, _ = torch.cuda.mem_get_info()
    return int(free_bytes)


def card_use() -> CardUse | None:
    """Current use of the card; load and temperature if the driver's library reports them (package nvidia-ml-py).

    None if the card has failed: its steps fail with the reason, and the stage's other metrics are still needed.
    """
    try:
        free_bytes, memory_bytes = torch.cuda.mem_get_info()
    except RuntimeError:
        return None
    busy_percent, celsius = _reported(torch.cuda.utilization), _reported(torch.cuda.temperature)
    busy_share = None if busy_percent is None else busy_percent / 100
    return CardUse(card_name(), int(memory_bytes), int(free_bytes), busy_share, celsius)


def _reported(read: Callable[[], float]) -> float | None:
    try:
        return float(read())
    except Exception:  # noqa: BLE001  # whatever a driver raises, the other metrics are reported without this one
        return None


def _image_for(capability: tuple[int, int]) -> str:
    """The image that has kernels for a card, in words."""
    if capability <= NEWEST_OF_CU126:
        return "the image of Dockerfile.gpu as it is (torch 2.14.1 from the cu126 index is the last one for Pascal)"
    return (
        "the image of Dockerfile.gpu with torch from a newer index (in .env: TORCH_GPU_INDEX_URL="
        f"https://download.pytorch.org/whl/cu130 and TORCH_KERNELS=sm_{capability[0]}{capability[1]})"
    )


def _has_kernels_for(capability: tuple[int, int], kernels: Iterable[str]) -> bool:
    """Whether binary code or PTX in the list runs on a card.

    Binary code runs on cards of its major version and at least its minor version, PTX on every later card.
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
