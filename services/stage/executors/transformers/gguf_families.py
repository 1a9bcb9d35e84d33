"""Which GGUF files transformers computes: those whose tensors are its own, but for their names, order and offsets.

torch is not imported here: the choice of an executor asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.model.gguf import read_gguf


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What the files' writer has changed in a model type's tensors."""

    interleaved: bool = False  # rows of q and k: pairs that rotate together lie side by side, not half a head apart
    norm_offset: float = 0.0  # was added to the weights of norms


GGUF_FAMILIES: Mapping[str, GgufFamily] = {  # by architecture
    "arcee": GgufFamily(interleaved=True),
    "cohere2": GgufFamily(),
    "command-r": GgufFamily(),
    "ernie4_5": GgufFamily(),
    "exaone4": GgufFamily(),
    "gemma": GgufFamily(norm_offset=1.0),
    "gemma2": GgufFamily(norm_offset=1.0),
    "gemma3": GgufFamily(norm_offset=1.0),
    "glm4": GgufFamily(),
    "granite": GgufFamily(interleaved=True),
    "hunyuan-dense": GgufFamily(),
    "llama": GgufFamily(interleaved=True),
    "mistral3": GgufFamily(interleaved=True),
    "nemotron": GgufFamily(norm_offset=1.0),
    "olmo2": GgufFamily(),
    "phi2": GgufFamily(),
    "phi3": GgufFamily(),
    "qwen2": GgufFamily(),
    "qwen3": GgufFamily(),
    "seed_oss": GgufFamily(),
    "smollm3": GgufFamily(interleaved=True),
    "stablelm": GgufFamily(),
    "starcoder2": GgufFamily(),
}


def only_ggml_computes(model: Path, config: Mapping[str, Any]) -> str:
    """Which file transformers does not compute, in words; empty for a folder and for a file that it computes."""
    if not model.is_file():
        return ""
    architecture = read_gguf(model).architecture
    family, experts = GGUF_FAMILIES.get(architecture), config.get("num_local_experts")
    # halves of the rotating part alone do not follow from the order of whole heads
    is_partial = "partial_rotary_factor" in (config.get("rope_parameters") or {})
    if family is not None and not experts and not (family.interleaved and is_partial):
        return ""
    with_what = " with experts" if experts else " with partial rotary positions" if family else ""
    return f"{model.name} is a GGUF file of architecture {architecture}{with_what}"
