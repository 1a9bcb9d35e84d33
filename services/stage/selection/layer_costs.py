"""What a layer of any model costs on a machine: a pure function of the model's header and the machine's speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from msgspec import Struct

from noodle.cluster.plan import Source
from noodle.model.formats import STORED, WEIGHT_ITEM_BYTES
from noodle.model.ggml_types import GGML_TYPES
from noodle.model.tensor_entry import TensorEntry

# Products are measured with these numbers of rows: one session's token, a step that a few sessions share, and a chunk
# of a prompt.
ROW_COUNTS = (1, 4, 128)
CONTEXT_TOKENS = 128  # rows that a decode token attends to
LAYER_OPERATIONS = 22  # of a graph, for each layer, whatever its size: norms, positions, copies, sums
HIDDEN_PASSES = 12  # over a token's hidden state, by operations that are not products
TYPE_BY_FORMAT = {name: name.upper() for name in WEIGHT_ITEM_BYTES}  # ggml's types by values of NOODLE_WEIGHTS
HEAD_SEGMENTS = frozenset({"lm_head", "embed_out", "output"})


class MachineSpeed(Struct, frozen=True):
    """What a device takes for the parts of any layer, measured with some number of threads."""

    threads: int
    # by ggml's name of a weight's type: seconds for each byte of it in a product with ROW_COUNTS rows
    product_seconds: dict[str, tuple[float, ...]]
    operation_seconds: float  # of the smallest operation of a graph
    item_seconds: float  # of an operation over many rows, for each item
    key_seconds: float  # attention of one token, for each item of the keys of all heads
    chunk_key_seconds: float  # attention of a chunk, for each item of the keys of all heads of each of its tokens
    sample_seconds: float  # sampling, for each token of the vocabulary

    @property
    def is_plausible(self) -> bool:
        """Whether everything takes time."""
        numbers = [seconds for each in self.product_seconds.values() for seconds in each]
        others = (self.operation_seconds, self.item_seconds, self.key_seconds, self.chunk_key_seconds)
        return min((*numbers, *others, self.sample_seconds), default=0.0) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """The matrices of a mean layer and of the head, in bytes by ggml's names of their types."""

    layer_bytes: Mapping[str, float]
    expert_bytes: Mapping[str, float]  # of all experts of a layer
    head_bytes: Mapping[str, float]
    expert_share: float  # experts that compute a token, of all
    hidden_size: int
    query_items: int  # items of a token's query: heads times head dimension
    vocab_size: int

    @property
    def types(self) -> tuple[str, ...]:
        """The types of matrices, those of most bytes first."""
        total: dict[str, float] = defaultdict(float)
        for part in (self.layer_bytes, self.expert_bytes, self.head_bytes):
            for name, byte_count in part.items():
                total[name] += byte_count
        return tuple(sorted(total, key=lambda name: -total[name]))

    def fits(self, weights: str) -> bool:
        """Whether the model's rows are whole blocks of a format, as far as its hidden size shows."""
        return self.hidden_size % GGML_TYPES[TYPE_BY_FORMAT[weights]].block_items == 0

    def in_format(self, weights: str) -> ModelWeights:
        """The same matrices in a format of NOODLE_WEIGHTS."""
        if weights == STORED:
            return self
        name = TYPE_BY_FORMAT[weights]

        def converted(part: Mapping[str, float]) -> Mapping[str, float]:
            return {name: sum(byte_count / _item_bytes(each) for each, byte_count in part.items()) * _item_bytes(name)}

        return replace(
            self,
            layer_bytes=converted(self.layer_bytes),
            expert_bytes=converted(self.expert_bytes) if self.expert_bytes else {},
            head_bytes=converted(self.head_bytes),
        )


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one model's layer and head on one device, as the planner needs them (MachineReport)."""

    decode_layer_seconds: float  # one layer, one token
    prefill_layer_seconds_per_token: float  # one layer, per token of a chunk
    head_decode_seconds: float  # head and sampling of one row
    batched_layer_seconds: float  # one layer, for each token of a step of BATCHED_SESSIONS sessions
    batched_head_seconds: float  # head and sampling, for each of its rows
    source: Source = "measured"
    layer_weight_bytes: float = 0.0  # of one layer in memory; 0 if it is not known

    @property
    def is_plausible(self) -> bool:
        """Whether layers take time, and the head does not take less than none."""
        layers = (self.decode_layer_seconds, self.batched_layer_seconds, self.prefill_layer_seconds_per_token)
        return min(layers) > 0 and min(self.head_decode_seconds, self.batched_head_seconds) >= 0


def model_weights(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], layer_count: int) -> ModelWeights:
    """Sort the matrices of a model, as ggml holds them, into those of layers, of experts and of the head.

    `config` is a completed one.
    """
    layers: dict[str, float] = defaultdict(float)
    experts: dict[str, float] = defaultdict(float)
    heads: dict[str, float] = defaultdict(float)
    embeddings: dict[str, float] = defaultdict(float)
    vocab_size, hidden_size = int(config["vocab_size"]), int(config["hidden_size"])
    for name, entry in entries.items():
        if len(entry.shape) < 2:
            continue
        segments = name.split(".")
        number = next((int(segment) for segment in segments if segment.isdecimal()), None)
        held = "F32" if entry.dtype == "F64" else entry.dtype
        if held not in GGML_TYPES:
            continue
        byte_count = float(GGML_TYPES[held].byte_count(entry.item_count))
        if number is not None:
            is_expert = "experts" in segments or any(segment.endswith("_exps") for segment in segments)
            if number < layer_count:
                (experts if is_expert else layers)[held] += byte_count / layer_count
        elif HEAD_SEGMENTS & set(segments):
            heads[held] += byte_count
        elif vocab_size in entry.shape:
            embeddings[held] += byte_count
    query_heads = int(config["num_attention_heads"])
    expert_count, chosen_count = (int(config.get(f"num_{name}") or 1) for name in ("local_experts", "experts_per_tok"))
    return ModelWeights(
        layer_bytes=dict(layers),
        expert_bytes=dict(experts),
        head_bytes=dict(heads or embeddings),
        expert_share=min(1.0, chosen_count / expert_count),
        hidden_size=hidden_size,
        query_items=query_heads * int(config["head_dim"]),
        vocab_size=vocab_size,
    )


def layer_seconds(weights: ModelWeights, speed: MachineSpeed) -> LayerSeconds:
    """Derive the seconds of a mean layer and of the head; `speed` should have the types of all matrices."""
    one, few, chunk = (_layer_seconds(weights, speed, index) for index in range(len(ROW_COUNTS)))
    head, batched_head = (_head_seconds(weights, speed, index) for index in (0, 1))
    return LayerSeconds(
        decode_layer_seconds=one,
        prefill_layer_seconds_per_token=chunk / ROW_COUNTS[2],
        head_decode_seconds=head,
        batched_layer_seconds=few / ROW_COUNTS[1],
        batched_head_seconds=batched_head / ROW_COUNTS[1],
        layer_weight_bytes=sum(weights.layer_bytes.values()) + sum(weights.expert_bytes.values()),
    )


def _layer_seconds(weights: ModelWeights, speed: MachineSpeed, index: int) -> float:
    rows = ROW_COUNTS[index]
    seconds = _product_seconds(weights.layer_bytes, speed, index)
    if weights.expert_bytes:
        seconds += _expert_seconds(weights, speed, rows)
    if rows < ROW_COUNTS[2]:
        attended, key_seconds = rows * CONTEXT_TOKENS, speed.key_seconds
    else:
        attended, key_seconds = rows * (rows + 1) // 2, speed.chunk_key_seconds
    seconds += LAYER_OPERATIONS * speed.operation_seconds
    seconds += rows * HIDDEN_PASSES * weights.hidden_size * speed.item_seconds
    return seconds + attended * weights.query_items * key_seconds


def _expert_seconds(weights: ModelWeights, speed: MachineSpeed, rows: int) -> float:
    """Products of the experts that `rows` tokens choose evenly: each one that is used is read once for all its rows."""
    used = 1.0 - (1.0 - weights.expert_share) ** rows
    rows_each = rows * weights.expert_share / used  # of an expert that is used
    measured = [_product_seconds(weights.expert_bytes, speed, index) for index in range(len(ROW_COUNTS))]
    return used * float(np.interp(rows_each, ROW_COUNTS, measured))


def _head_seconds(weights: ModelWeights, speed: MachineSpeed, index: int) -> float:
    sampling = ROW_COUNTS[index] * weights.vocab_size * speed.sample_seconds
    return _product_seconds(weights.head_bytes, speed, index) + sampling


def _product_seconds(byte_counts: Mapping[str, float], speed: MachineSpeed, index: int) -> float:
    """A type that the device does not multiply by costs nothing: loading it is refused by name."""
    known = speed.product_seconds
    return sum(byte_count * known[name][index] for name, byte_count in byte_counts.items() if name in known)


def _item_bytes(name: str) -> float:
    return GGML_TYPES[name].block_bytes / GGML_TYPES[name].block_items
