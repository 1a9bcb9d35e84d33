"""The model types that noodle runs; test_families.py shows for each that the split model equals the whole one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.quantization import read_quantization

FAMILIES = frozenset({
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "llama", "minicpm3", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
})  # fmt: skip

# The module of learned positions, which is added to all input of the layers: it must return zeros on later stages.
LEARNED_POSITIONS = {"biogpt": "embed_positions", "gpt2": "wpe"}

# "su" is longrope in the first configs of Phi-3
ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn", "longrope", "su"})
# their rotary type is called dynamic too, but with `alpha` it only has another base
FIXED_ALPHA = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})


def check_supported(config: Mapping[str, Any]) -> None:
    """Check that noodle runs this config.json; raises UnsupportedModel with the reason and the cure."""
    model_type = str(config.get("model_type") or "")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.8)
        hint = f" (is it {near[0]}?)" if near else ""
        raise UnsupportedModel(
            f"noodle does not run models of type {model_type or 'unnamed'!r}{hint}.",
            cure=f"Choose a model of one of these types: {', '.join(sorted(FAMILIES))}.",
        )
    read_quantization(config)
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(
            f"this {model_type} model attends to later tokens too, so it cannot generate token by token.",
            cure="Choose a generative model.",
        )
    for rotary_type in rotary_types(config):
        if rotary_type == "dynamic":
            raise UnsupportedModel(
                "this model's rotary scaling is 'dynamic': its frequencies depend on the longest session in a step, "
                "so the output for one user would depend on the others.",
                cure="Set rope_parameters in the model's config.json to yarn, llama3 or linear scaling, or remove it "
                "and stay within the original length.",
            )
        if rotary_type not in ROTARY_TYPES:
            raise UnsupportedModel(
                f"this model's rotary scaling is {rotary_type!r}, which noodle does not run.",
                cure=f"Choose a model with one of: {', '.join(sorted(ROTARY_TYPES))}.",
            )


def rotary_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield every rotary type in a config: at its top, or for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = config.get(name)
        if not isinstance(parameters, Mapping):
            continue
        for candidate in (parameters, *parameters.values()):
            if isinstance(candidate, Mapping):
                named = candidate.get("rope_type") or candidate.get("type")
                if named == "dynamic" and candidate.get("alpha") and config.get("model_type") in FIXED_ALPHA:
                    named = "default"
                if isinstance(named, str):
                    yield named
