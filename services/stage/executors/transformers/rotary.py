"""Makes rotary frequencies independent of the sessions that share a step.

Transformers chooses longrope's short or long factors by the largest position of a batch. Here they are chosen once, by
the plan's context length. default, linear, llama3 and yarn are constant already; dynamic is refused earlier
(families.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED = "longrope_fixed"  # transformers' forward recomputes nothing for this name


def fix_rotary(model: torch.nn.Module, context_length: int) -> None:
    """Fix every longrope module to the factors for `context_length` tokens."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if rope_type == "longrope":
            _fix(module, None, context_length)
            module.rope_type = _FIXED  # type: ignore[assignment]
        elif isinstance(rope_type, dict):
            for layer_type, layer_rope_type in rope_type.items():
                if layer_rope_type == "longrope":
                    _fix(module, layer_type, context_length)
            module.rope_type = {  # type: ignore[assignment]
                name: _FIXED if kind == "longrope" else kind for name, kind in rope_type.items()
            }


def divide_frequencies(model: torch.nn.Module, factors: npt.NDArray[np.float32]) -> None:
    """Divide the frequency of each rotating pair by its factor: a GGUF file holds these instead of llama3's numbers."""
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if frequencies is not None:
            frequencies.div_(torch.from_numpy(factors))


def _fix(module: Any, layer_type: str | None, context_length: int) -> None:
    options = {} if layer_type is None else {"layer_type": layer_type}
    prefix = "" if layer_type is None else f"{layer_type}_"
    buffer: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    frequencies, attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, buffer.device, seq_len=context_length, **options
    )
    buffer.copy_(frequencies)
    setattr(module, f"{prefix}attention_scaling", attention_scaling)
