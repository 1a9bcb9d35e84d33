"""Rotary frequencies that never depend on who shares a step; knows transformers' rotary modules, nothing else.

Transformers chooses longrope's short or long factors by the largest position of the batch. Here the choice is made
once, by the context length that the plan promises. default, linear, llama3 and yarn are fixed at construction as they
are; dynamic is refused before (families.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED = "longrope_fixed"  # a name that transformers' forward does not recompute anything for


def fix_rotary(model: torch.nn.Module, context_length: int) -> None:
    """Set every longrope module to the factors for `context_length` tokens, and keep it from changing them."""
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


def _fix(module: Any, layer_type: str | None, context_length: int) -> None:
    options = {} if layer_type is None else {"layer_type": layer_type}
    prefix = "" if layer_type is None else f"{layer_type}_"
    buffer: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    frequencies, attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, buffer.device, seq_len=context_length, **options
    )
    buffer.copy_(frequencies)
    setattr(module, f"{prefix}attention_scaling", attention_scaling)
