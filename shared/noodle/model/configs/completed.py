"""Completes a config.json with the values that transformers' config classes fill in, without importing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.configs.defaults import DEFAULTS

# other names of the same value
ALIASES: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
    "moe_num_experts": "num_local_experts",
    "moe_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function")
# far above any known model; a larger number means a broken file, and would cause an allocation of that size
MAXIMA: Mapping[str, int] = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 20,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 30,
}
SCALED_ROTARY = ("llama3", "yarn", "longrope")  # types that stretch an original length
FULL, SLIDING = "full_attention", "sliding_attention"


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with every value that its model type has a default or a rule for; other keys stay as they are.

    The activation is under `hidden_act`. `rope_parameters` replaces the older spellings; it is one mapping, or one for
    each type of layer. Raises UnsupportedModel for values of the wrong kind.
    """
    model_type = str(config.get("model_type") or "")
    defaults = DEFAULTS.get(model_type, {})
    given = dict(config)
    for alias, name in ALIASES.items():
        if name not in given and alias in given:
            given[name] = given[alias]
    own_activation = next((given[name] for name in ACTIVATION_NAMES if name in defaults and given.get(name)), None)
    whole = {**defaults, **given}
    whole["hidden_act"] = own_activation or _first(defaults, ACTIVATION_NAMES) or _first(given, ACTIVATION_NAMES)
    try:
        _check_sizes(whole, model_type)
        if whole.get("num_key_value_heads") is None:
            whole["num_key_value_heads"] = whole["num_attention_heads"]
        if whole.get("head_dim") is None:
            whole["head_dim"] = int(whole["hidden_size"]) // int(whole["num_attention_heads"])
        if "v_head_dim" in whole and whole["v_head_dim"] is None:
            whole["v_head_dim"] = int(whole["hidden_size"]) // int(whole["num_attention_heads"])
        if "use_sliding_window" in defaults and not whole["use_sliding_window"]:
            whole["sliding_window"] = None
        whole["layer_types"] = _layer_types(whole)
        if "layer_norm_epsilon" not in defaults:  # learned positions have no rotary parameters
            whole["rope_parameters"] = _rope_parameters(whole, given, model_type)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UnsupportedModel(
            f"the config of this {model_type or 'unnamed'} model has a missing or malformed value "
            f"({type(error).__name__}: {error}).",
            cure="Fetch the model again.",
        ) from error
    return whole


def _check_sizes(whole: Mapping[str, Any], model_type: str) -> None:
    for name, maximum in MAXIMA.items():
        value = whole.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum):
            raise UnsupportedModel(
                f"the config of this {model_type or 'unnamed'} model says {name} {value!r}, which is not a number from "
                f"1 to {maximum}.",
                cure="Fetch the model again.",
            )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _layer_types(whole: dict[str, Any]) -> list[str]:
    """The type of each layer's attention; empty if the model's sliding window applies to all or none of them."""
    count = int(whole["num_hidden_layers"])
    if "no_rope_layer_interval" in whole and whole.get("no_rope_layers") is None:
        interval = int(whole["no_rope_layer_interval"])
        whole["no_rope_layers"] = [int((number + 1) % interval != 0) for number in range(count)]
    if whole.get("layer_types"):
        return list(whole["layer_types"])
    window = whole.get("sliding_window")
    if "no_rope_layer_interval" in whole:
        slides = whole.get("use_sliding_window") and window is not None
        return [SLIDING if slides and not rotary else FULL for rotary in whole["no_rope_layers"]]
    if "sliding_window_pattern" in whole:
        if window is None:
            return [FULL] * count
        pattern = int(whole["sliding_window_pattern"])
        return [SLIDING if (number + 1) % pattern else FULL for number in range(count)]
    if "max_window_layers" in whole:
        first = int(whole["max_window_layers"])
        return [SLIDING if window is not None and number >= first else FULL for number in range(count)]
    return []


def _rope_parameters(whole: dict[str, Any], given: dict[str, Any], model_type: str) -> dict[str, Any]:
    stated = dict(given.get("rope_scaling") or given.get("rope_parameters") or whole.get("rope_parameters") or {})
    nested = [kind for kind in stated if kind in (FULL, SLIDING)]
    if "rope_local_base_freq" in whole:
        scaling = stated if not nested else {}
        parameters = {FULL: dict(stated.get(FULL) or scaling), SLIDING: dict(stated.get(SLIDING) or {})}
        parameters[FULL].setdefault("rope_theta", whole["rope_theta"])
        parameters[SLIDING].setdefault("rope_theta", whole["rope_local_base_freq"])
        return {kind: _standard(each, whole, model_type) for kind, each in parameters.items()}
    if nested:
        return {kind: _standard(dict(stated[kind]), whole, model_type) for kind in nested if stated[kind]}
    return _standard(stated, whole, model_type)


def _standard(parameters: dict[str, Any], whole: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """One mapping of parameters with transformers' spelling and defaults."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if model_type.startswith("hunyuan") and kind == "dynamic" and parameters.get("alpha"):
        # a fixed base in place of frequencies that depend on a session's length
        dimensions = int(whole["head_dim"])
        base = float(parameters.get("rope_theta") or whole["rope_theta"])
        parameters = {"rope_theta": base * float(parameters["alpha"]) ** (dimensions / (dimensions - 2))}
        kind = "default"
    if model_type in ("phi3", "phimoe") and kind in ("su", "yarn"):  # names of longrope in Phi-3's first configs
        kind = "longrope"
    parameters["rope_type"] = kind
    parameters.setdefault("rope_theta", whole.get("rope_theta", 10_000.0))
    if whole.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", whole["partial_rotary_factor"])
    if kind in SCALED_ROTARY:
        if whole.get("original_max_position_embeddings") is not None:
            parameters["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
        else:
            parameters.setdefault("original_max_position_embeddings", whole["max_position_embeddings"])
    return parameters
