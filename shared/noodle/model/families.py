"""The model types noodle runs, each shown to be the same cut as whole (test_families.py); knows configs, not torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from noodle.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular about a model type when it is cut."""

    # module of learned positions, added to whatever enters the layers: it must give zeros on later stages
    learned_positions: str = ""


PLAIN = Family()

FAMILIES: dict[str, Family] = {
    "apertus": PLAIN,
    "arcee": PLAIN,
    "biogpt": Family(learned_positions="embed_positions"),
    "bitnet": PLAIN,
    "cohere": PLAIN,
    "cohere2": PLAIN,
    "deepseek_v2": PLAIN,
    "ernie4_5": PLAIN,
    "ernie4_5_moe": PLAIN,
    "exaone4": PLAIN,
    "flex_olmo": PLAIN,
    "gemma": PLAIN,
    "gemma2": PLAIN,
    "gemma3_text": PLAIN,
    "glm": PLAIN,
    "glm4": PLAIN,
    "glm4_moe": PLAIN,
    "gpt2": Family(learned_positions="wpe"),
    "gpt_neox": PLAIN,
    "gpt_oss": PLAIN,
    "granite": PLAIN,
    "granitemoe": PLAIN,
    "granitemoeshared": PLAIN,
    "helium": PLAIN,
    "hunyuan_v1_dense": PLAIN,
    "llama": PLAIN,
    "minicpm3": PLAIN,
    "ministral": PLAIN,
    "mistral": PLAIN,
    "mixtral": PLAIN,
    "nemotron": PLAIN,
    "olmo": PLAIN,
    "olmo2": PLAIN,
    "olmo3": PLAIN,
    "olmoe": PLAIN,
    "persimmon": PLAIN,
    "phi": PLAIN,
    "phi3": PLAIN,
    "qwen2": PLAIN,
    "qwen2_moe": PLAIN,
    "qwen3": PLAIN,
    "qwen3_moe": PLAIN,
    "seed_oss": PLAIN,
    "smollm3": PLAIN,
    "stablelm": PLAIN,
    "starcoder2": PLAIN,
    "vaultgemma": PLAIN,
}

# "su" is what Phi-3's first configs call longrope
ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn", "longrope", "su"})


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that noodle does not run, by name; raises UnsupportedModel with the reason and the cure."""
    model_type = str(config.get("model_type") or "")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.8)
        hint = f" (is it {near[0]}?)" if near else ""
        raise UnsupportedModel(
            f"models of type {model_type or 'unnamed'!r}{hint} are not run by noodle.",
            cure=f"Choose a model of one of these types: {', '.join(sorted(FAMILIES))}.",
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise UnsupportedModel(
            f"the weights of this {model_type} model are quantized ({method}), which noodle does not compute with.",
            cure="Take the model's float32, float16 or bfloat16 version.",
        )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(
            f"this {model_type} model attends to later tokens too, so it can not generate token by token.",
            cure="Choose a generative model.",
        )
    for rotary_type in rotary_types(config):
        if rotary_type == "dynamic":
            raise UnsupportedModel(
                "this model's rotary scaling is 'dynamic': it takes the frequencies from the longest session that "
                "happens to be in a step, so what one user gets would depend on the others.",
                cure="Set rope_parameters in the model's config.json to yarn, llama3 or linear scaling, or remove it "
                "and stay within the original length.",
            )
        if rotary_type not in ROTARY_TYPES:
            raise UnsupportedModel(
                f"this model's rotary scaling {rotary_type!r} is not run by noodle.",
                cure=f"Choose a model with one of: {', '.join(sorted(ROTARY_TYPES))}.",
            )


def rotary_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Every rotary type that a config names: at its top, or for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = config.get(name)
        if not isinstance(parameters, Mapping):
            continue
        for candidate in (parameters, *parameters.values()):
            if isinstance(candidate, Mapping):
                named = candidate.get("rope_type") or candidate.get("type")
                if isinstance(named, str):
                    yield named
