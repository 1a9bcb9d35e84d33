"""A model's dimensions and factors, read from its config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.configs.completed import completed_config
from services.stage.executors.ggml.families import (
    ACTIVATIONS,
    GGML_FAMILIES,
    USE_TRANSFORMERS,
    Activation,
    ExpertFamily,
    GgmlFamily,
    ggml_lacks,
)
from services.stage.executors.ggml.rotary import Rotary, rotary_of

XIELU_NAMES = ("xielu_alpha_n", "xielu_alpha_p", "xielu_beta", "xielu_eps")  # as GGUF files have them, by layer
EPSILON_NAMES = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps")
KV_MULTIPLES = {"f32": 1, "f16": 1, "q8_0": 32}  # of a head's size, by format of KV rows
NO_EXPERTS = ExpertFamily({})


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Dimensions of attention whose K and V are products with a latent vector, kept as one row of K with one head.

    The row is the latent vector and a part with rotary positions, which all heads share. V is the latent vector.
    """

    rank: int  # of the latent vector
    rotary_dim: int
    plain_dim: int  # of each head's K without rotary positions
    value_dim: int  # of each head's V


@dataclass(frozen=True)
class ModelShape:
    """Dimensions and factors of the whole model; per-layer tuples are indexed by the layer's number in the model."""

    family: GgmlFamily
    layer_count: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int  # of Q and K
    value_dim: int  # of V, as it is kept
    norm_epsilon: float
    activation: Activation
    token_scale: float  # factor of token embeddings
    input_scale: float  # factor of the first layer's input
    residual_scale: float
    attention_scale: float
    attention_cap: float  # 0 means none
    logit_scale: float
    logit_cap: float  # 0 means none
    windows: tuple[int, ...]  # 0 means none
    rotaries: tuple[Rotary | None, ...]
    parallel: bool  # attention and feed-forward part both start from the layer's input
    query_growth: float  # of q with the logarithm of the position in units of `growth_length`; 0 means none
    growth_length: int
    interleaved: bool  # which dimensions of a head rotate together, as GgmlFamily has it
    tied: bool
    maximum_positions: int
    experts: int
    experts_per_token: int
    normalised_experts: bool
    share_scale: float  # of the chosen experts' shares
    smallest_share_sum: float  # 0 means none
    expert_groups: int
    chosen_groups: int
    router_jitter: float
    gate_steepness: float  # of a clamped activation, 0 if the model has none
    gate_limit: float
    latent: LatentShape | None
    activation_values: tuple[tuple[float, ...], ...]  # by layer, if the config has them; empty otherwise

    @property
    def areas(self) -> int:
        """Rows of a token in each layer: K and V, or a latent vector for both."""
        return 1 if self.latent else 2


def shape_of(given: Mapping[str, Any], context_length: int) -> ModelShape:
    """Read the dimensions from a config.json, in which defaults may be left out.

    Raises UnsupportedModel if ggml lacks something, or if a value is missing or malformed.
    """
    lacking = ggml_lacks(given)
    if lacking:
        raise UnsupportedModel(f"ggml does not compute this model: {lacking}.", cure=USE_TRANSFORMERS)
    config = completed_config(given)
    try:
        return _shape(config, GGML_FAMILIES[config["model_type"]], context_length)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError, StopIteration) as error:
        raise UnsupportedModel(
            f"the config of this {config['model_type']} model has a missing or malformed value "
            f"({type(error).__name__}: {error}).",
            cure="Fetch the model again.",
        ) from error


def kv_problem(given: Mapping[str, Any], kv_format: str) -> str:
    """Why the rows of a model cannot be kept in a format of NOODLE_KV; empty if they can."""
    config = completed_config(given)
    latent = _latent(config) if GGML_FAMILIES[config["model_type"]].latent else None
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    sizes = (latent.rank + latent.rotary_dim, latent.rank) if latent else (head_dim,)
    wrong = [size for size in sizes if size % KV_MULTIPLES[kv_format]]
    if not wrong:
        return ""
    multiple = KV_MULTIPLES[kv_format]
    return f"KV rows in {kv_format} need a head size that is a multiple of {multiple}, and this model's is {wrong[0]}."


def _shape(config: Mapping[str, Any], family: GgmlFamily, context_length: int) -> ModelShape:
    layer_count = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    latent = _latent(config) if family.latent else None
    rotary_dim = latent.rotary_dim if latent else head_dim
    router = family.experts or NO_EXPERTS
    parameters = config.get("rope_parameters") or {}
    experts = int(config.get("num_local_experts") or 0) if family.experts else 0
    normalised = router.normalised
    if family.attention_scale:
        attention_scale = float(config[family.attention_scale])
    elif latent:
        attention_scale = (latent.plain_dim + latent.rotary_dim) ** -0.5 * _yarn_scale(config["rope_parameters"])
    elif family.query_scalar:
        attention_scale = float(config[family.query_scalar]) ** -0.5
    else:
        attention_scale = head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    return ModelShape(
        family=family,
        layer_count=layer_count,
        hidden_size=int(config["hidden_size"]),
        vocab_size=int(config["vocab_size"]),
        heads=heads,
        kv_heads=1 if latent else int(config.get("num_key_value_heads") or heads),
        head_dim=latent.rank + latent.rotary_dim if latent else head_dim,
        value_dim=latent.rank if latent else head_dim,
        norm_epsilon=float(next(config[name] for name in EPSILON_NAMES if config.get(name) is not None)),
        activation=ACTIVATIONS[config["hidden_act"]],
        token_scale=_token_scale(config, family),
        input_scale=_factor(config, family.embedding_scale),
        residual_scale=_factor(config, family.residual_scale)
        * (_factor(config, family.depth_scale) / layer_count**0.5 if family.depth_scale else 1.0),
        attention_scale=attention_scale,
        attention_cap=_cap(config, family.attention_cap),
        logit_scale=_factor(config, family.logit_factor)
        / _factor(config, family.logit_divisor)
        * (_factor(config, family.logit_width) / config["hidden_size"] if family.logit_width else 1.0),
        logit_cap=_cap(config, family.logit_cap),
        windows=_windows(config, family, layer_count),
        rotaries=_rotaries(config, family, layer_count, rotary_dim, context_length),
        parallel=bool(config[family.parallel] if isinstance(family.parallel, str) else family.parallel),
        query_growth=float(parameters.get("llama_4_scaling_beta") or 0.0),
        growth_length=int(parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]),
        interleaved=bool(config.get("rope_interleave", family.interleaved)),
        tied=bool(config["tie_word_embeddings"]),
        maximum_positions=int(config["max_position_embeddings"]),
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 0) if experts else 0,
        normalised_experts=bool(config[normalised] if isinstance(normalised, str) else normalised),
        share_scale=_factor(config, router.share_scale),
        smallest_share_sum=_cap(config, router.smallest_sum),
        expert_groups=1 if config.get("topk_method") == "greedy" else _groups(config, router.groups),
        chosen_groups=_groups(config, router.chosen_groups),
        router_jitter=_cap(config, router.jitter),
        gate_steepness=_cap(config, router.steepness),
        gate_limit=_cap(config, router.limit),
        latent=latent,
        activation_values=_activation_values(config, layer_count),
    )


def _latent(config: Mapping[str, Any]) -> LatentShape:
    return LatentShape(
        rank=int(config["kv_lora_rank"]),
        rotary_dim=int(config["qk_rope_head_dim"]),
        plain_dim=int(config["qk_nope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
    )


def _yarn_scale(parameters: Mapping[str, Any]) -> float:
    """Factor of q·k of latent attention with yarn."""
    by, factor = float(parameters.get("mscale_all_dim") or 0.0), float(parameters.get("factor") or 1.0)
    if not by or factor <= 1 or parameters.get("rope_type", "default") == "default":
        return 1.0
    return (0.1 * by * math.log(factor) + 1.0) ** 2


def _token_scale(config: Mapping[str, Any], family: GgmlFamily) -> float:
    if isinstance(family.scaled_embedding, str):
        return float(config[family.scaled_embedding])
    return float(config["hidden_size"]) ** 0.5 if family.scaled_embedding else 1.0


def _activation_values(config: Mapping[str, Any], layer_count: int) -> tuple[tuple[float, ...], ...]:
    names = [name for name in XIELU_NAMES if isinstance(config.get(name), list)]
    if len(names) < len(XIELU_NAMES):
        return ()
    return tuple(tuple(float(config[name][number]) for name in names) for number in range(layer_count))


def _factor(config: Mapping[str, Any], name: str) -> float:
    return float(config[name]) if name else 1.0


def _groups(config: Mapping[str, Any], name: str) -> int:
    return int(config[name] or 1) if name else 1


def _cap(config: Mapping[str, Any], name: str) -> float:
    return float(config[name] or 0.0) if name else 0.0


def _windows(config: Mapping[str, Any], family: GgmlFamily, layer_count: int) -> tuple[int, ...]:
    window = int(config.get("sliding_window") or 0)
    layer_types = config.get("layer_types")
    if layer_types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return (window if family.windowed else 0,) * layer_count


def _rotaries(
    config: Mapping[str, Any], family: GgmlFamily, layer_count: int, head_dim: int, context_length: int
) -> tuple[Rotary | None, ...]:
    if family.positions:
        return (None,) * layer_count
    maximum = int(config["max_position_embeddings"])
    original = int(config.get("original_max_position_embeddings") or maximum)
    parameters = config["rope_parameters"]
    layer_types = config.get("layer_types") or ["full_attention"] * layer_count
    by_type: dict[str, Rotary] = {}
    for kind in layer_types:
        if kind not in by_type:
            by_type[kind] = rotary_of(parameters.get(kind, parameters), head_dim, maximum, original, context_length)
    has_rotary = config.get("no_rope_layers") or [1] * layer_count  # 1 is a layer with rotary positions
    if family.rotary_in_windows and config.get("sliding_window"):
        has_rotary = [int(kind == "sliding_attention") for kind in layer_types]
    return tuple(by_type[kind] if rotary else None for kind, rotary in zip(layer_types, has_rotary, strict=True))
