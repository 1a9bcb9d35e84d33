"""Read from a model's config and headers what the planner needs; reads no weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from noodle.cluster.plan import ModelShape
from noodle.errors import ConfigurationError, UnsupportedModel
from noodle.model.files import model_digest, read_config, read_tensor_entries
from noodle.model.local import served_name
from noodle.model.quantization import held_tensors
from noodle.model.tensor_entry import TensorEntry

# names that model families give to the same number
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
HEAD_COUNT_KEYS = ("num_attention_heads", "n_head")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
# far above any known model; a larger number means a broken file, and would cause an allocation of that size
MAXIMUM_LAYERS = 4096
MAXIMUM_HIDDEN_SIZE = 1 << 20
MAXIMUM_VOCABULARY = 1 << 26
MAXIMUM_CONTEXT = 1 << 30
MAXIMUM_HEADS = 1 << 16

HEAD_SEGMENTS = frozenset({"lm_head", "embed_out", "output"})  # the last one is a GGUF file's
POSITION_SEGMENTS = frozenset({"wpe", "embed_positions", "position_embeddings", "position_embd"})
BROKEN_CURE = "Fetch or convert the model again. If it is complete, noodle does not know this family."


def read_model_shape(model: Path, context_length: int | None = None) -> ModelShape:
    """Read the shape of a model, a folder or a GGUF file; by default with its own context length.

    Raises ModelNotFound, UnsupportedModel for absurd or missing fields and for layers that contradict the config, and
    ConfigurationError for a longer context than the model's.
    """
    config = read_config(model)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModel(f"{_config_of(model)} names no model_type.", cure=BROKEN_CURE)
    layer_count = _count(config, LAYER_COUNT_KEYS, MAXIMUM_LAYERS, model)
    entries = held_tensors(config, read_tensor_entries(model))
    layer_bytes, others = _split_by_layer(entries, layer_count, model)
    embedding_bytes, head_bytes = _ends(others, model)
    stored_bytes = sum(entry.byte_count for entry in entries.values())
    return ModelShape(
        digest=model_digest(model),
        name=served_name(model),
        model_type=model_type,
        layer_count=layer_count,
        hidden_size=_count(config, HIDDEN_SIZE_KEYS, MAXIMUM_HIDDEN_SIZE, model),
        vocab_size=_count(config, ("vocab_size",), MAXIMUM_VOCABULARY, model),
        context_length=_context_length(config, context_length, model),
        stored_item_bytes=stored_bytes / sum(entry.item_count for entry in entries.values()),
        layer_bytes=layer_bytes,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        kv_items_per_token_per_layer=_kv_items(config, model),
    )


def _count(config: Mapping[str, Any], keys: tuple[str, ...], maximum: int, model: Path) -> int:
    """The value of the first key that is set, an integer from 1 to `maximum`."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise UnsupportedModel(
                f"{_config_of(model)}: {key} is {value!r}, not a number from 1 to {maximum}.", cure=BROKEN_CURE
            )
        return value
    raise UnsupportedModel(f"{_config_of(model)} does not set {' or '.join(keys)}.", cure=BROKEN_CURE)


def _context_length(config: Mapping[str, Any], asked: int | None, model: Path) -> int:
    own = _count(config, CONTEXT_KEYS, MAXIMUM_CONTEXT, model)
    if asked is None:
        return own
    if not 1 <= asked <= own:
        raise ConfigurationError(
            f"NOODLE_CONTEXT_LENGTH={asked}, but {model.name} has a context of {own} tokens.",
            cure=f"Set it to at most {own}, or leave it unset.",
        )
    return asked


def _kv_items(config: Mapping[str, Any], model: Path) -> int:
    """K and V items of one token in one layer."""
    heads = _count(config, HEAD_COUNT_KEYS, MAXIMUM_HEADS, model)
    if config.get("qk_rope_head_dim") is not None:
        # latent attention (deepseek, minicpm3): the cache holds K and V of every head, as attention reads them
        key_dim = sum(
            _count(config, (key,), MAXIMUM_HIDDEN_SIZE, model) for key in ("qk_nope_head_dim", "qk_rope_head_dim")
        )
        return heads * (key_dim + _count(config, ("v_head_dim",), MAXIMUM_HIDDEN_SIZE, model))
    kv_heads = _count(config, ("num_key_value_heads", *HEAD_COUNT_KEYS), MAXIMUM_HEADS, model)
    if config.get("head_dim") is not None:
        head_dim = _count(config, ("head_dim",), MAXIMUM_HIDDEN_SIZE, model)
    else:
        head_dim = math.ceil(_count(config, HIDDEN_SIZE_KEYS, MAXIMUM_HIDDEN_SIZE, model) / heads)
    return 2 * kv_heads * head_dim


def _split_by_layer(
    entries: Mapping[str, TensorEntry], layer_count: int, model: Path
) -> tuple[tuple[int, ...], dict[str, TensorEntry]]:
    """Bytes of each layer, and the tensors that belong to no layer.

    Finds the layers without knowing the family's names: their list is the shortest prefix (`model.layers`, `h`) that
    the numbers 0 to `layer_count` - 1 follow; experts lie deeper. Higher numbers are layers that only training used
    (multi-token prediction), which hold other tensors; no stage loads them, so they are not counted. Raises
    UnsupportedModel for a higher number whose tensors are those of an ordinary layer.
    """
    layers: dict[tuple[str, ...], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in entries:
        segments = name.split(".")
        for position, segment in enumerate(segments):
            if segment.isdecimal():
                layers[tuple(segments[:position])][int(segment)].append(name)
    wanted = set(range(layer_count))
    prefixes = sorted((it for it, found in layers.items() if wanted <= found.keys()), key=lambda it: (len(it), it))
    if not prefixes:
        longest = max((len(found) for found in layers.values()), default=0)
        raise UnsupportedModel(
            f"{_config_of(model)} says {layer_count} layers, but the weights hold at most {longest} in a row.",
            cure=BROKEN_CURE,
        )
    chosen = layers[prefixes[0]]
    ordinary = {_names_below(prefixes[0], chosen[number]) for number in wanted}
    more = [
        number for number in chosen if number not in wanted and _names_below(prefixes[0], chosen[number]) in ordinary
    ]
    if more:
        raise UnsupportedModel(
            f"{_config_of(model)} says {layer_count} layers, but the weights hold layer {min(more)} too, which is like "
            "the others.",
            cure=BROKEN_CURE,
        )
    layer_bytes = tuple(sum(entries[name].byte_count for name in chosen[number]) for number in range(layer_count))
    inside = {name for names in chosen.values() for name in names}
    return layer_bytes, {name: entry for name, entry in entries.items() if name not in inside}


def _names_below(prefix: tuple[str, ...], names: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Names of one layer's tensors without its prefix and number."""
    return frozenset(tuple(name.split(".")[len(prefix) + 1 :]) for name in names)


def _ends(others: Mapping[str, TensorEntry], model: Path) -> tuple[int, int]:
    """Bytes of the embeddings, and of the final norm with the head; a tied head counts the token embedding again."""
    embedding_bytes = token_embedding_bytes = head_bytes = 0
    has_own_head = False
    for name, entry in others.items():
        segments = set(name.split("."))
        is_head = bool(segments & HEAD_SEGMENTS)
        has_own_head |= is_head and len(entry.shape) == 2
        is_embedding = segments & {"wte", *POSITION_SEGMENTS} or any(
            "embed" in segment or segment.endswith("_embd") for segment in segments
        )
        if is_embedding and not is_head:
            embedding_bytes += entry.byte_count
            if not segments & POSITION_SEGMENTS:
                token_embedding_bytes += entry.byte_count
        else:
            head_bytes += entry.byte_count
    if not token_embedding_bytes:
        raise UnsupportedModel(f"{model} holds no token embedding that noodle recognises.", cure=BROKEN_CURE)
    return embedding_bytes, head_bytes if has_own_head else head_bytes + token_embedding_bytes


def _config_of(model: Path) -> Path:
    """Where the values of a model's config stand, for its errors."""
    return model if model.is_file() else model / "config.json"
