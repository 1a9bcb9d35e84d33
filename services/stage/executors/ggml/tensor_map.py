"""The tensors ggml computes a slice with, and the names in the model's files that each one is made of.

Matrices with the same input are joined: q, k and v; gate and up. A tensor is named after its module in families.py,
with `.weight` or `.bias`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.gguf import first_unread
from services.stage.executors.ggml.families import ExpertFamily, GgmlFamily
from services.stage.executors.ggml.shape import LatentShape, ModelShape

Cut = tuple[int | slice | list[int], ...]  # indices into a stored tensor
ACTIVATION_VALUES = "activation_values"  # the tensor with the numbers of a layer's activation
ShapeOf = Callable[[str], tuple[int, ...] | None]  # stored shape of a key; None if there is no such tensor

# names of modules in GGUF files, below the layer
GGUF_MODULES: Mapping[str, str] = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_key_value": "attn_qkv",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "query_latent": "attn_q_a",
    "query_latent_norm": "attn_q_a_norm",
    "query_of_latent": "attn_q_b",
    "latent": "attn_kv_a_mqa",
    "latent_norm": "attn_kv_a_norm",
    "key_value_of_latent": "attn_kv_b",
    "key_of_latent": "attn_k_b",
    "value_of_latent": "attn_v_b",
    "sinks": "attn_sinks",
    "output": "attn_output",
    "attention_inner_norm": "attn_sub_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward_inner_norm": "ffn_sub_norm",
    "feed_forward_post_norm": "post_ffw_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "gate_up": "ffn_up",  # both, if there is no ffn_gate
    "down": "ffn_down",
}
LATENT_PARTS = ("key_of_latent", "value_of_latent")  # of key_value_of_latent, in files since 2025
GGUF_EXPERTS: Mapping[str, str] = {
    "router": "ffn_gate_inp",
    "gate": "ffn_gate_exps",
    "up": "ffn_up_exps",
    "gate_up": "ffn_gate_up_exps",
    "down": "ffn_down_exps",
    "shared_gate": "ffn_gate_shexp",
    "shared_up": "ffn_up_shexp",
    "shared_down": "ffn_down_shexp",
    "shared_router": "ffn_gate_inp_shexp",
}
GGUF_CORRECTION = "exp_probs_b.bias"
# tensors of a GGUF file's layers that repeat others, or what its header says
GGUF_REPETITIONS = ("attn_rot_embd", "attn_rope_freqs", "rope_freqs", "attn_kv_b", "attn_k_b", "attn_v_b")


def as_in_gguf(family: GgmlFamily) -> GgmlFamily:
    """The family with the names of GGUF files, whose writer has shifted and transposed weights for ggml."""
    names = (*family.modules, *(LATENT_PARTS if family.latent else ()))
    return replace(
        family,
        modules={**{name: GGUF_MODULES[name] for name in names}, **family.gguf_modules},
        joined_heads=False,
        layer="blk.{}.",
        embedding="token_embd",
        positions=family.positions and "position_embd",
        final_norm="output_norm",
        head="output",
        norm_offset=0.0,
        activation_values=(),  # in the header
        transposed=False,
        experts=family.experts and _experts_in_gguf(family.experts),
    )


def _experts_in_gguf(family: ExpertFamily) -> ExpertFamily:
    return replace(family, modules=GGUF_EXPERTS, alternating=False, correction=family.correction and GGUF_CORRECTION)


def refuse_unread(model: Path, names: Collection[str], read: Collection[str], layers: range) -> None:
    """Raise UnsupportedModel for a tensor of a GGUF file's layers that its family does not read: it has an effect."""
    if name := first_unread(names, read, layers, GGUF_REPETITIONS):
        raise UnsupportedModel(
            f"{model} holds the tensor {name}, which noodle does not compute with in such a model.",
            cure="Choose another file of this model, or its safetensors with NOODLE_EXECUTOR=transformers.",
        )


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor: the rows of its sources in order; a source may be named several times.

    `cuts` selects a part of each source as it is stored, as numpy's indices do; without them sources are used whole.
    """

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]  # in ggml's order: the row length first
    is_matrix: bool = False  # held in the weights' type; otherwise float32
    is_multiplied: bool = False  # a matrix of products that is held in float32
    transposed: bool = False
    offset: float = 0.0
    cuts: tuple[Cut, ...] = ()

    def cut(self, index: int) -> Cut:
        """The part of a source that is used."""
        return self.cuts[index] if self.cuts else ()

    @property
    def row_count(self) -> int:
        """Number of rows over all dimensions but the first."""
        return math.prod(self.sizes[1:])


class TensorMap:
    """The sources of one model's tensors, checked against the shapes in its folder."""

    def __init__(self, shape: ModelShape, shape_of_key: ShapeOf, folder: str) -> None:
        self._shape = shape
        self._shape_of_key = shape_of_key
        self._folder = folder

    def of_slice(self, start_layer: int, end_layer: int) -> dict[str, list[TensorSource]]:
        """A slice's tensors by block: a layer's number, `embedding`, `positions`, `final_norm` and `head`."""
        shape, family, hidden = self._shape, self._shape.family, self._shape.hidden_size
        blocks = {str(number): self.layer(number) for number in range(start_layer, end_layer)}
        is_last = end_layer == shape.layer_count
        if start_layer == 0 or (is_last and shape.tied):
            blocks["embedding"] = [self._matrix("embedding.weight", [family.embedding], hidden, shape.vocab_size)]
        if start_layer == 0 and family.positions:
            sources, sizes = (f"{family.positions}.weight",), (hidden, shape.maximum_positions)
            blocks["positions"] = [self._checked(TensorSource("positions.weight", sources, sizes))]
        if is_last:
            blocks["final_norm"] = self._norm("final_norm", family.final_norm)
            if not shape.tied:
                blocks["head"] = self._linear("head", [family.head], hidden, shape.vocab_size)
            elif self._has(family.head, "bias"):
                bias = TensorSource("head.bias", (f"{family.head}.bias",), (shape.vocab_size,))
                blocks["head"] = [self._checked(bias)]
        return blocks

    def layer(self, number: int) -> list[TensorSource]:
        """All tensors of a layer; raises ModelNotFound if one is missing or has another shape."""
        shape, family = self._shape, self._shape.family
        prefix = family.layer.format(number)
        keys = {name: prefix + key for name, key in family.modules.items()}
        tensors: list[TensorSource] = []
        for name in ("attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm"):
            if name in keys and not (name == "feed_forward_norm" and shape.parallel and not self._has(keys[name])):
                tensors += self._norm(name, keys[name])
        tensors += self._latent_attention(keys, shape.latent) if shape.latent else self._attention(keys)
        if family.activation_values:
            sources = tuple(prefix + name for name in family.activation_values)
            tensors.append(self._checked(TensorSource(ACTIVATION_VALUES, sources, (len(sources),))))
        if family.experts and self._has(prefix + family.experts.modules["router"]):
            return tensors + self._experts(prefix, family.experts)
        return tensors + self._feed_forward(keys)

    def _attention(self, keys: dict[str, str]) -> list[TensorSource]:
        shape, hidden = self._shape, self._shape.hidden_size
        query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        fused, inner_norm = keys.get("query_key_value"), keys.get("attention_inner_norm")
        parts = [fused] if fused and self._has(fused) else [keys[name] for name in ("query", "key", "value")]
        cuts = _joined_heads(shape.heads, shape.head_dim) if shape.family.joined_heads else ()
        return [
            *self._linear("query_key_value", parts, hidden, query + 2 * key_value, cuts),
            *self._query_key_norms(keys),
            *self._linear("output", [keys["output"]], query, hidden),
            *(self._norm("attention_inner_norm", inner_norm, query) if inner_norm else ()),
            *(self._sinks(keys["sinks"]) if "sinks" in keys else ()),
        ]

    def _sinks(self, key: str) -> list[TensorSource]:
        source = f"{key}.weight" if self._has(key) else key
        return [self._checked(TensorSource("sinks.weight", (source,), (self._shape.heads,)))]

    def _latent_attention(self, keys: dict[str, str], latent: LatentShape) -> list[TensorSource]:
        """Q, the latent vector, and by head the matrices that turn Q to the latent vector's space and that one to V."""
        shape, hidden = self._shape, self._shape.hidden_size
        query = shape.heads * (latent.plain_dim + latent.rotary_dim)
        if self._has(keys["query_latent"]):
            rank = self._rows_of(keys["query_latent"])
            tensors = [
                *self._linear("query_latent", [keys["query_latent"]], hidden, rank),
                *self._norm("query_latent_norm", keys["query_latent_norm"], rank),
                *self._linear("query", [keys["query_of_latent"]], rank, query),
            ]
        else:
            tensors = self._linear("query", [keys["query"]], hidden, query)
        tensors += self._linear("latent", [keys["latent"]], hidden, latent.rank + latent.rotary_dim)
        tensors += self._norm("latent_norm", keys["latent_norm"], latent.rank)
        tensors += self._latent_parts(keys, latent)
        return tensors + self._linear("output", [keys["output"]], shape.heads * latent.value_dim, hidden)

    def _latent_parts(self, keys: dict[str, str], latent: LatentShape) -> list[TensorSource]:
        heads, step = self._shape.heads, latent.plain_dim + latent.value_dim
        key_sizes, value_sizes = (latent.plain_dim, latent.rank, heads), (latent.rank, latent.value_dim, heads)
        if "key_of_latent" in keys and self._has(keys["key_of_latent"]):
            parts = (("key_of_latent", key_sizes), ("value_of_latent", value_sizes))
            return [
                self._checked(TensorSource(f"{name}.weight", (f"{keys[name]}.weight",), sizes, is_matrix=True))
                for name, sizes in parts
            ]
        sources = (f"{keys['key_value_of_latent']}.weight",) * heads
        key_rows = tuple((slice(step * head, step * head + latent.plain_dim),) for head in range(heads))
        value_rows = tuple((slice(step * head + latent.plain_dim, step * (head + 1)),) for head in range(heads))
        key = TensorSource("key_of_latent.weight", sources, key_sizes, is_matrix=True, transposed=True, cuts=key_rows)
        value = TensorSource("value_of_latent.weight", sources, value_sizes, is_matrix=True, cuts=value_rows)
        return [self._checked(key), self._checked(value)]

    def _norm(self, name: str, key: str, size: int = 0) -> list[TensorSource]:
        sizes = (size or self._shape.hidden_size,)
        weight = TensorSource(f"{name}.weight", (f"{key}.weight",), sizes, offset=self._shape.family.norm_offset)
        bias = TensorSource(f"{name}.bias", (f"{key}.bias",), sizes)
        return [self._checked(weight), *([self._checked(bias)] if self._has(key, "bias") else [])]

    def _query_key_norms(self, keys: dict[str, str]) -> list[TensorSource]:
        shape, family = self._shape, self._shape.family
        query, key = keys.get("query_norm", ""), keys.get("key_norm", "")
        if not query or not self._has(query.format(0)):
            return []
        if family.query_key_norm == "heads":
            sizes = (shape.head_dim, shape.heads + shape.kv_heads)
            return [
                self._checked(TensorSource(f"query_key_norm.{kind}", sources, sizes, offset=offset))
                for kind, offset in (("weight", family.norm_offset), ("bias", 0.0))
                if self._has(query.format(0), kind)
                for sources in [self._by_head(query, kind, shape.heads) + self._by_head(key, kind, shape.kv_heads)]
            ]
        return [
            self._checked(TensorSource(f"{name}.weight", (f"{source}.weight",), (rows,), offset=family.norm_offset))
            for name, source, rows in (
                ("query_norm", query, shape.heads * shape.head_dim),
                ("key_norm", key, shape.kv_heads * shape.head_dim),
            )
        ]

    def _by_head(self, key: str, kind: str, heads: int) -> tuple[str, ...]:
        """The sources of a norm's weights for each head: one tensor for all heads, or one for each."""
        names = tuple(f"{key.format(head)}.{kind}" for head in range(heads))
        return names[:1] if len(self._stored(names[0])) == 2 else names

    def _experts(self, prefix: str, family: ExpertFamily) -> list[TensorSource]:
        """The router's tensors, those of its experts, and those of the expert that every token passes."""
        keys = {name: prefix + key for name, key in family.modules.items()}
        hidden, count = self._shape.hidden_size, self._shape.experts
        tensors = [
            self._checked(
                TensorSource("router.weight", (f"{keys['router']}.weight",), (hidden, count), is_multiplied=True)
            )
        ]
        if self._has(keys["router"], "bias"):
            tensors.append(self._checked(TensorSource("router.bias", (f"{keys['router']}.bias",), (count,))))
        if family.correction and self._shape_of_key(prefix + family.correction) is not None:
            tensors.append(self._checked(TensorSource("router_correction", (prefix + family.correction,), (count,))))
        if family.alternating:
            return tensors + self._alternating_experts(keys)
        is_split = "{}" in keys["down"]
        parts = ("gate_up",) if "gate_up" in keys and self._has(keys["gate_up"]) else ("gate", "up")
        if is_split:
            inner = self._rows_of(keys["gate"].format(0))
            both = [keys[name].format(number) for number in range(count) for name in ("gate", "up")]
            tensors += self._expert_matrix("gate_up", both, (hidden, 2 * inner, count))
        else:
            inner = self._stored(f"{keys['down']}.weight")[-1]
            for name in parts:
                rows = 2 * inner if name == "gate_up" else inner
                tensors += self._expert_matrix(name, [keys[name]], (hidden, rows, count))
        downs = [keys["down"].format(number) for number in range(count)] if is_split else [keys["down"]]
        tensors += self._expert_matrix("down", downs, (inner, hidden, count))
        if "shared_down" in keys and self._has(keys["shared_down"]):
            tensors += self._feed_forward(keys, "shared_")
        if "shared_router" in keys and self._has(keys["shared_router"]):
            sources = (f"{keys['shared_router']}.weight",)
            tensors.append(
                self._checked(TensorSource("shared_router.weight", sources, (hidden, 1), is_multiplied=True))
            )
        return tensors

    def _expert_matrix(self, name: str, keys: list[str], sizes: tuple[int, ...]) -> list[TensorSource]:
        sources = tuple(f"{key}.weight" for key in keys)
        tensors = [self._checked(TensorSource(f"expert_{name}.weight", sources, sizes, is_matrix=True))]
        if len(keys) == 1 and self._has(keys[0], "bias"):
            bias = TensorSource(f"expert_{name}.bias", (f"{keys[0]}.bias",), sizes[1:])
            tensors.append(self._checked(bias))
        return tensors

    def _alternating_experts(self, keys: Mapping[str, str]) -> list[TensorSource]:
        """Matrices of all experts, [in, out] or, in MXFP4, [out, in]; rows of gate and up in turns."""
        hidden, count = self._shape.hidden_size, self._shape.experts
        tensors: list[TensorSource] = []
        for name in ("gate_up", "down"):
            key = keys[name]
            bias = self._stored(f"{key}_bias")
            outputs = bias[-1] if bias else 0
            inputs = hidden if name == "gate_up" else math.prod(self._stored(key)[1:]) // max(1, outputs)
            order = [*range(0, outputs, 2), *range(1, outputs, 2)] if name == "gate_up" else list(range(outputs))
            turned = self._shape_of_key(f"{key}_blocks") is None
            cuts: tuple[Cut, ...] = tuple(
                (expert, slice(None), order) if turned else (expert, order) for expert in range(count)
            )
            sizes = (inputs, outputs, count)
            weight = TensorSource(f"expert_{name}.weight", (key,) * count, sizes, is_matrix=True, transposed=turned)
            tensors += [
                self._checked(replace(weight, cuts=cuts)),
                self._checked(
                    TensorSource(f"expert_{name}.bias", (f"{key}_bias",), sizes[1:], cuts=((slice(None), order),))
                ),
            ]
        return tensors

    def _feed_forward(self, keys: Mapping[str, str], prefix: str = "") -> list[TensorSource]:
        hidden, down = self._shape.hidden_size, keys[f"{prefix}down"]
        inner = self._rows_of(down, column=True)
        gate, up, fused = (keys.get(f"{prefix}{name}", "") for name in ("gate", "up", "gate_up"))
        has_gate = bool(gate) and self._has(gate)
        if fused and self._has(fused) and not has_gate:
            tensors = self._linear(f"{prefix}gate_up", [fused], hidden, 2 * inner)
        elif has_gate:
            tensors = self._linear(f"{prefix}gate_up", [gate, up], hidden, 2 * inner)
        else:
            tensors = self._linear(f"{prefix}up", [up], hidden, inner)
        inner_norm = keys.get(f"{prefix}feed_forward_inner_norm")
        if inner_norm:
            tensors += self._norm(f"{prefix}feed_forward_inner_norm", inner_norm, inner)
        return tensors + self._linear(f"{prefix}down", [down], inner, hidden)

    def _linear(
        self, name: str, keys: list[str], inputs: int, outputs: int, cuts: tuple[Cut, ...] = ()
    ) -> list[TensorSource]:
        """A matrix and its bias, if it has one; `cuts` are those of the first key's rows."""
        keys = keys[:1] * len(cuts) or keys
        tensors = [self._matrix(f"{name}.weight", keys, inputs, outputs, cuts)]
        if self._has(keys[0], "bias"):
            sources = tuple(f"{key}.bias" for key in keys)
            tensors.append(self._checked(TensorSource(f"{name}.bias", sources, (outputs,), cuts=cuts)))
        return tensors

    def _matrix(
        self, name: str, keys: list[str], inputs: int, outputs: int, cuts: tuple[Cut, ...] = ()
    ) -> TensorSource:
        sources = tuple(f"{key}.weight" for key in keys)
        transposed = self._shape.family.transposed and not name.startswith(("embedding", "head"))
        return self._checked(
            TensorSource(name, sources, (inputs, outputs), is_matrix=True, transposed=transposed, cuts=cuts)
        )

    def _has(self, key: str, kind: str = "weight") -> bool:
        return self._shape_of_key(f"{key}.{kind}") is not None

    def _rows_of(self, key: str, *, column: bool = False) -> int:
        """Number of outputs of a matrix, or of its inputs (`column`)."""
        stored = self._stored(f"{key}.weight")
        return stored[int(column) ^ int(self._shape.family.transposed)] if len(stored) == 2 else 0

    def _stored(self, key: str) -> tuple[int, ...]:
        stored = self._shape_of_key(key)
        if stored is None:
            raise self._mismatch(f"they lack {key}")
        return stored

    def _checked(self, tensor: TensorSource) -> TensorSource:
        """Check that the sources have the tensor's row length, and together its rows."""
        rows = 0
        for index, key in enumerate(tensor.sources):
            stored = shape_of_cut(self._stored(key), tensor.cut(index))
            if tensor.transposed:
                stored = stored[::-1]
            if len(tensor.sizes) == 1:
                rows += math.prod(stored) if math.prod(stored) == (stored or (1,))[-1] else -1
            else:
                rows += math.prod(stored[:-1]) if stored and stored[-1] == tensor.sizes[0] else -1
        expected = tensor.sizes[0] if len(tensor.sizes) == 1 else tensor.row_count
        if rows != expected:
            keys = dict.fromkeys(tensor.sources)
            shapes = [list(self._stored(key)) for key in keys]
            raise self._mismatch(f"{', '.join(keys)} have shapes {shapes}, but {list(tensor.sizes[::-1])} is needed")
        return tensor

    def _mismatch(self, reason: str) -> ModelNotFound:
        return ModelNotFound(
            f"the weights in {self._folder} are not those of its config: {reason}.",
            cure="Fetch the model again, and check that config and weights belong to the same model.",
        )


def _joined_heads(heads: int, head_dim: int) -> tuple[Cut, ...]:
    """The rows of Q of all heads, of K and of V, in a matrix with q, k and v of one head after another."""
    return tuple(
        (slice((3 * head + part) * head_dim, (3 * head + part + 1) * head_dim),)
        for part in range(3)
        for head in range(heads)
    )


def leading_range(shape: tuple[int, ...], cut: Cut) -> tuple[int, int, Cut]:
    """The range of a tensor's first axis that a cut lies in, and the cut within that range."""
    if not cut:
        return 0, shape[0], ()
    first = cut[0]
    if isinstance(first, int):
        return first, first + 1, (slice(None), *cut[1:])  # an int beside a list would move the list's axis
    if isinstance(first, list):
        return 0, shape[0], cut
    begin, end, step = first.indices(shape[0])
    return begin, end, (slice(None, None, step), *cut[1:])


def shape_of_cut(stored: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape that a cut of a stored tensor has; empty if the tensor has fewer axes."""
    if len(cut) > len(stored):
        return ()
    sizes = [
        len(part) if isinstance(part, list) else len(range(*part.indices(size)))
        for size, part in zip(stored, cut, strict=False)
        if not isinstance(part, int)
    ]
    return (*sizes, *stored[len(cut) :])
