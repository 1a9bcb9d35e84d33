"""The config.json that a GGUF file's header stands for, by its architecture's row.

Every key below the architecture's prefix is understood, or neutral, or refused by name: a value that is passed over
would change the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.configs.architectures import (
    ARCHITECTURES,
    GRANITE_KEYS,
    QUERY_SCALARS,
    REASONS,
    SIGMOID_GATING,
    TEMPERATURE_SCALE,
    YARN_MULTIPLIER,
    Architecture,
)
from noodle.model.gguf import GgufFile

FETCH_CURE = "Fetch the file again. If it is complete, noodle does not know this kind of model."
OTHER_CURE = "Choose another model, or this model's safetensors with NOODLE_EXECUTOR=transformers."
MAXIMUM_LAYERS, MAXIMUM_SIZE, MAXIMUM_POSITIONS = 4096, 1 << 20, 1 << 30
FULL, SLIDING = "full_attention", "sliding_attention"
ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)

# keys that the function below reads for every architecture
READ_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "attention.causal", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count", "expert_gating_func", "nextn_predict_layers",
})  # fmt: skip
# keys that repeat what tensors or the tokenizer say, or that only training used
HINTS = frozenset({
    "vocab_size", "feed_forward_length", "expert_feed_forward_length", "rope.scaling.finetuned", "tensor_data_layout",
    "rope.scaling.yarn_ext_factor", "expert_shared_feed_forward_length", "expert_shared_count",
    "leading_dense_block_count", "interleave_moe_layer_step",
})  # fmt: skip
FACTOR_KEYS = ("factors", "long_factor", "short_factor")  # of rope_parameters
ROUTER = ".ffn_gate_inp.weight"
LAYER_NAME = re.compile(r"blk\.(\d{1,9})\.")
ORIGINAL_LENGTH = "original_max_position_embeddings"


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a file's model; raises UnsupportedModel naming the file and the key."""
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        why = f": {REASONS[file.architecture]}" if file.architecture in REASONS else ""
        raise UnsupportedModel(
            f"{file.path} is of architecture {file.architecture!r}, which noodle does not compute{why}.",
            cure=f"Choose a model of one of these: {', '.join(sorted(ARCHITECTURES))}.",
        )
    return _Reader(file, architecture).config()


def factor_tensors(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the tensors that hold factors of rotary frequencies, which stand in `rope_parameters` in their place."""
    rotary = config.get("rope_parameters") or {}
    return {key: value for key, value in rotary.items() if key in FACTOR_KEYS and isinstance(value, str)}


def _magnitude(factor: float, by: float = 1.0) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


class _Reader:
    """Reads one file's keys, which are given without their prefix."""

    def __init__(self, file: GgufFile, architecture: Architecture) -> None:
        self._file, self._row = file, architecture
        self._prefix = f"{file.architecture}."

    def config(self) -> dict[str, Any]:
        row = self._row
        self._check_keys()
        extra = self._integer("nextn_predict_layers", default=0, minimum=0, maximum=MAXIMUM_LAYERS)
        # layers that only guess further tokens come last and are left out
        layers = self._integer("block_count", minimum=extra + 1, maximum=MAXIMUM_LAYERS) - extra
        hidden = self._integer("embedding_length", maximum=MAXIMUM_SIZE)
        vocab_size = self._vocabulary(hidden)
        self._check_layers(layers, extra)
        heads = self._integer("attention.head_count", maximum=MAXIMUM_SIZE)
        kv_heads = self._integer("attention.head_count_kv", default=heads, maximum=MAXIMUM_SIZE)
        if heads % kv_heads:
            raise self._refused("attention.head_count_kv", f"is {kv_heads}, which does not divide {heads} heads")
        head_dim = 0 if row.latent else self._head_dim(hidden, heads)
        experts = self._integer("expert_count", default=0, minimum=0, maximum=1 << 16)
        model_type = row.moe_model_type if experts else row.model_type
        if not model_type:
            raise self._refused("expert_count", f"is {experts}, and noodle knows no such model with experts")
        if experts and not any(name.endswith(ROUTER) for name in self._file.entries):
            raise self._refused("expert_count", f"is {experts}, but no layer has a router (*{ROUTER})")
        config: dict[str, Any] = {
            "model_type": model_type,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "vocab_size": vocab_size,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._integer("context_length", maximum=MAXIMUM_POSITIONS),
            row.epsilon: self._epsilon(),
            "tie_word_embeddings": "output.weight" not in self._file.entries,
            "rope_interleave": row.interleaved,
            "sliding_window": None,
            **row.values,
        }
        if experts:
            config["num_local_experts"] = experts
            config["num_experts_per_tok"] = self._integer("expert_used_count", maximum=experts)
        for key, name in row.keys.items():
            value = self._value(key)
            if value is not None:
                config[name] = value
        if row.keys is GRANITE_KEYS:
            config.setdefault("attention_multiplier", head_dim**-0.5)
        for key, name in row.by_layer.items():
            config[name] = self._by_layer(key, layers)
        if row.latent:
            self._add_latent(config, heads)
            head_dim = config["head_dim"]
        self._add_windows(config, layers)
        if "position_embd.weight" not in self._file.entries:
            config["rope_parameters"] = self._rotary(head_dim, config)
            original = config["rope_parameters"].get(ORIGINAL_LENGTH)
            if original is not None:
                config[ORIGINAL_LENGTH] = original  # some families have it there, with a default of their own
            for name in (TEMPERATURE_SCALE, YARN_MULTIPLIER):
                if name in config:
                    config["rope_parameters"][name] = config.pop(name)
            config["rope_parameters"] |= row.rotary
        if model_type in QUERY_SCALARS:
            divided = hidden // heads if layers == QUERY_SCALARS[model_type] else head_dim
            config["query_pre_attn_scalar"] = divided
        return config

    def _check_keys(self) -> None:
        """Refuse keys that are not understood, unless their value is neutral."""
        known = READ_KEYS | HINTS | self._row.keys.keys()
        for name, value in self._file.metadata.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in known:
                continue
            count = self._file.count_of(name)
            if count == 0 or (value is not True and value in (0, 1, "", "none")):
                continue
            shown = f"{count} values" if count is not None else repr(value)[:60]
            raise self._refused(key, f"is {shown}, which changes the result in a way that noodle does not know")
        if self._value("expert_gating_func") not in (None, 0, *self._row.gatings):
            raise self._refused("expert_gating_func", "is not the one that noodle knows of such a model")
        if self._value("attention.causal") is False:
            raise self._refused("attention.causal", "is false: the model attends to later tokens too")

    def _vocabulary(self, hidden: int) -> int:
        entry = self._file.entries.get("token_embd.weight")
        if entry is None or len(entry.shape) != 2:
            raise UnsupportedModel(f"{self._file.path} holds no token embeddings.", cure=FETCH_CURE)
        rows, length = entry.shape
        if length != hidden:
            raise self._refused("embedding_length", f"is {hidden}, but its token embeddings have {length} items")
        return rows

    def _check_layers(self, layers: int, extra: int) -> None:
        """Each layer has tensors, and none lies after the last one: a wrong count would compute with some left out."""
        numbers = {int(match[1]) for name in self._file.entries if (match := LAYER_NAME.match(name))}
        missing = next((number for number in range(layers) if number not in numbers), None)
        if missing is not None:
            raise self._refused("block_count", f"is {layers + extra}, but there is no tensor of layer {missing}")
        if max(numbers) >= layers + extra:
            raise self._refused("block_count", f"is {layers + extra}, but there are tensors of layer {max(numbers)}")

    def _head_dim(self, hidden: int, heads: int) -> int:
        given = self._integer("attention.key_length", default=0, minimum=0, maximum=MAXIMUM_SIZE)
        if not given and hidden % heads:
            raise self._refused("attention.head_count", f"is {heads}, which does not divide {hidden}")
        head_dim = given or hidden // heads
        value_dim = self._integer("attention.value_length", default=head_dim, maximum=MAXIMUM_SIZE)
        if value_dim != head_dim:
            raise self._refused("attention.value_length", f"is {value_dim}, and K's is {head_dim}")
        return head_dim

    def _add_latent(self, config: dict[str, Any], heads: int) -> None:
        """The dimensions of latent attention, and which of DeepSeek's models the file holds."""
        rotary = self._integer("rope.dimension_count", maximum=MAXIMUM_SIZE)
        whole = self._integer("attention.key_length", maximum=MAXIMUM_SIZE)
        key_dim = self._integer("attention.key_length_mla", default=whole, maximum=MAXIMUM_SIZE)
        plain = key_dim - rotary
        if plain < 1:
            raise self._refused("attention.key_length", f"is {key_dim}, and {rotary} of it have rotary positions")
        entry = self._file.entries.get("blk.0.attn_kv_b.weight")
        value_dim = entry.shape[0] // heads - plain if entry else 0
        config |= {
            "head_dim": rotary,
            "num_key_value_heads": heads,
            "kv_lora_rank": self._integer("attention.kv_lora_rank", maximum=MAXIMUM_SIZE),
            "q_lora_rank": self._integer("attention.q_lora_rank", default=0, minimum=0, maximum=MAXIMUM_SIZE) or None,
            "qk_rope_head_dim": rotary,
            "qk_nope_head_dim": plain,
            "v_head_dim": self._integer("attention.value_length_mla", default=value_dim, maximum=MAXIMUM_SIZE),
        }
        if config["model_type"] == "deepseek_v2" and self._value("expert_gating_func") == SIGMOID_GATING:
            config["model_type"] = "deepseek_v3"

    def _epsilon(self) -> float:
        for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            if self._value(key) is not None:
                return self._number(key)
        raise self._refused("attention.layer_norm_rms_epsilon", "is missing")

    def _add_windows(self, config: dict[str, Any], layers: int) -> None:
        window = self._integer("attention.sliding_window", default=0, minimum=0, maximum=MAXIMUM_POSITIONS)
        window = window or config["sliding_window"] or 0
        config["sliding_window"] = window or None
        flags = self._file.array(self._prefix + "attention.sliding_window_pattern")
        if self._row.windowed:
            if window and config["model_type"] == "llama":  # Mistral's files
                config["model_type"] = "mistral"
            return
        if not self._row.window_pattern:
            if window:
                raise self._refused("attention.sliding_window", f"is {window}, and noodle knows no such model with it")
            return
        if not window:
            config["layer_types"] = [FULL] * layers
            return
        if flags is not None:
            if len(flags) != layers:
                raise self._refused("attention.sliding_window_pattern", f"has {len(flags)} items for {layers} layers")
            config["layer_types"] = [SLIDING if slides else FULL for slides in flags]
            return
        pattern = self._integer(
            "attention.sliding_window_pattern", default=self._row.window_pattern, minimum=0, maximum=MAXIMUM_LAYERS
        )
        config["layer_types"] = [SLIDING if not pattern or (number + 1) % pattern else FULL for number in range(layers)]

    def _rotary(self, head_dim: int, config: Mapping[str, Any]) -> dict[str, Any]:
        parameters = self._scaling(config)
        dimensions = self._integer("rope.dimension_count", default=head_dim, maximum=head_dim)
        parameters["rope_theta"] = self._number("rope.freq_base", default=10_000.0)
        local: dict[str, Any] = {"rope_type": "default"}
        local["rope_theta"] = self._number("rope.freq_base_swa", self._row.local_theta or parameters["rope_theta"])
        if dimensions != head_dim:
            parameters["partial_rotary_factor"] = local["partial_rotary_factor"] = dimensions / head_dim
        return {FULL: parameters, SLIDING: local} if self._row.local_theta else parameters

    def _scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """rope_parameters without their base; the names of tensors stand for the factors in them."""
        entries = self._file.entries
        kind = self._value("rope.scaling.type")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        attention = self._number("rope.scaling.attn_factor", self._number("rope.scaling.yarn_attn_factor", 1.0))
        original = self._integer(
            "rope.scaling.original_context_length",
            default=config["max_position_embeddings"],
            maximum=MAXIMUM_POSITIONS,
        )
        if LONG_FACTORS in entries or SHORT_FACTORS in entries:
            return {
                "rope_type": "longrope",
                "long_factor": LONG_FACTORS,
                "short_factor": SHORT_FACTORS,
                "attention_factor": attention,
                "original_max_position_embeddings": original,
            }
        if kind == "yarn" and factor:
            yarn = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "attention_factor": attention
                * _magnitude(factor)
                / _magnitude(factor, config.get(YARN_MULTIPLIER, 0.0)),
                "beta_fast": self._number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self._number("rope.scaling.yarn_beta_slow", 1.0),
            }
            if "yarn_multiplier" in config:  # a tenth of mscale and of mscale_all_dim, which are the same
                by = 10.0 * self._number("rope.scaling.yarn_log_multiplier")
                yarn |= {"attention_factor": 1.0, "mscale_all_dim": by}
            return yarn
        if ROTARY_FACTORS in entries:
            return {"rope_type": "llama3", "factors": ROTARY_FACTORS}
        if kind in (None, "linear") and factor not in (0.0, 1.0):
            return {"rope_type": "linear", "factor": factor}
        if kind not in (None, "none", "linear", "yarn", "longrope"):
            raise self._refused("rope.scaling.type", f"is {kind!r}, which noodle does not know")
        return {"rope_type": "default"}

    def _by_layer(self, key: str, layers: int) -> list[float]:
        items = self._file.array(key)
        if items is None or len(items) != layers or not all(isinstance(item, float) for item in items):
            raise UnsupportedModel(f"{self._file.path}: {key} is not a number for each layer.", cure=FETCH_CURE)
        return items

    def _value(self, key: str) -> Any:
        return self._file.metadata.get(self._prefix + key)

    def _integer(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int) -> int:
        """A whole number, or an array that holds the same one for every layer."""
        items = self._file.array(self._prefix + key)
        if items is not None and len(set(items)) > 1:
            raise self._refused(key, "differs from layer to layer, which noodle does not compute")
        value = items[0] if items else self._value(key)
        if value is None or items == []:
            value = default
        if value is None:
            raise self._refused(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._refused(key, f"is {str(value)[:60]}, not a number from {minimum} to {maximum}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refused(key, f"is {str(value)[:60]}, not a number")
        return float(value)

    def _refused(self, key: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._file.path}: {self._prefix}{key} {why}.",
            cure=OTHER_CURE if "noodle" in why else FETCH_CURE,
        )
