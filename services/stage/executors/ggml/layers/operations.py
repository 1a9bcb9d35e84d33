"""The operations that all parts of a layer share, and the tensors that a slice computes with.

Activations are float32 [features, tokens] in ggml's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.stage.executors.ggml.graph import GraphMemory
from services.stage.executors.ggml.kernels.attention import FlashAttentionKernel
from services.stage.executors.ggml.kernels.products import PackedWeights, Routes
from services.stage.executors.ggml.shape import ModelShape

ITEM_BYTES = 4  # of activations
NEOX, INTERLEAVED = 2, 0  # how the dimensions of a head are paired for rotary positions
GGML_PRODUCTS = ("mul_mat", "mul_mat_id", "flash_attn_ext")
KEYS_ASSUMED = 1024  # of attention, when its work is compared with that of products
# operations of a layer at most, and of each of its spans: a graph's memory is sized before it is built
LAYER_TENSORS, SPAN_TENSORS = 144, 16


@dataclass(frozen=True)
class SliceTensors:
    """A slice's weights as ggml tensors, and how to compute with them."""

    layers: tuple[dict[str, int], ...]
    embedding: int  # 0 off the first stage
    positions: int
    final_norm: dict[str, int]
    head: dict[str, int]
    frequency_factors: tuple[int, ...]  # by layer; 0 without rotary positions
    query_scales: int  # factor of q at each position; 0 if it is always 1
    pairing: int  # NEOX or INTERLEAVED
    key_type: int  # of K and V
    row_bytes: int  # of a token's K in one layer
    activation_values: tuple[tuple[float, ...], ...]  # by layer; empty if the activation has none
    exact: bool  # float32 throughout: ggml's GELU table, which is float16, is not used
    kernels: PackedWeights | None = None
    packed: frozenset[int] = frozenset()  # the matrices that these kernels multiply by
    attention: FlashAttentionKernel | None = None  # with rows in its own layout; without it ggml attends


class Operations:
    """Adds operations to one graph's memory."""

    def __init__(self, memory: GraphMemory, shape: ModelShape, tensors: SliceTensors) -> None:
        self.memory = memory
        self.ggml = memory.ggml
        self.context = memory.context
        self.shape = shape
        self.tensors = tensors
        self.activation_values: tuple[float, ...] = ()  # of the layer that is being added
        self._tiles: dict[tuple[int, str], int] = {}  # rows in the kernels' layout, by their tensor and kind
        self._routes: dict[int, Routes] = {}  # by the tensor of the experts' ids

    def call(self, name: str, *arguments: Any) -> int:
        """Add ggml's operation of this name."""
        added = int(getattr(self.ggml, f"ggml_{name}")(self.context, *arguments))
        if name in GGML_PRODUCTS:
            length = 2 * KEYS_ASSUMED if name == "flash_attn_ext" else self.sizes(arguments[0])[0]
            self.memory.ggml_work += length * math.prod(self.sizes(added))
        return added

    def sizes(self, tensor: int) -> list[int]:
        return [int(size) for size in self.ggml.ggml_tensor.from_address(tensor).ne]

    def view(self, tensor: int, sizes: Sequence[int], strides: Sequence[int], offset: int) -> int:
        """A part of a tensor; `strides` are those of all axes but the first, in bytes."""
        return self.call(f"view_{len(sizes)}d", tensor, *sizes, *strides, offset)

    def scaled(self, tensor: int, factor: float) -> int:
        return tensor if factor == 1.0 else self.call("scale", tensor, factor)

    def linear(self, tensor: int, weights: dict[str, int], name: str) -> int:
        """The product with a weight of the layer, plus its bias if it has one."""
        result = self.product(weights[f"{name}.weight"], tensor)
        bias = weights.get(f"{name}.bias")
        return result if bias is None else self.call("add", result, bias)

    def product(self, weight: int, rows: int) -> int:
        """Like ggml's mul_mat of a weight and rows [features, count], by the fastest way."""
        kernels = self.tensors.kernels
        if kernels is not None and weight in self.tensors.packed:
            key = (rows, kernels.tiles_of(weight))
            if key not in self._tiles:
                self._tiles[key] = kernels.tiles(self.context, *key)
            product = kernels.product(self.context, weight, self._tiles[key])
            self.memory.own_work += self.sizes(weight)[0] * math.prod(self.sizes(product))
            return product
        return self.call("mul_mat", weight, rows)

    def expert_product(self, weight: int, rows: int, ids: int) -> int:
        """Like ggml's mul_mat_id of rows [features, 1 or slots, tokens] and ids of experts [slots, tokens]."""
        kernels = self.tensors.kernels
        if kernels is None or weight not in self.tensors.packed:
            return self.call("mul_mat_id", weight, rows, ids)
        if ids not in self._routes:
            self._routes[ids] = kernels.routes(self.context, ids, self.shape.experts)
        routes, key = self._routes[ids], (rows, kernels.tiles_of(weight))
        if key not in self._tiles:
            self._tiles[key] = kernels.tiles(self.context, *key, routes)
        product = kernels.product(self.context, weight, self._tiles[key], routes)
        self.memory.own_work += self.sizes(weight)[0] * math.prod(self.sizes(product))
        return product

    def norm(self, tensor: int, weights: dict[str, int], name: str, epsilon: float = 0.0) -> int:
        """Apply a norm of the layer, if the layer has it; `epsilon` replaces the model's."""
        weight = weights.get(f"{name}.weight")
        if weight is None:
            return tensor
        kind = "rms_norm" if self.shape.family.norm == "rms" else "norm"
        normed = self.call("mul", self.call(kind, tensor, epsilon or self.shape.norm_epsilon), weight)
        bias = weights.get(f"{name}.bias")
        return normed if bias is None else self.call("add", normed, bias)

    def feed_forward(self, tensor: int, weights: dict[str, int], prefix: str = "") -> int:
        """The layer's feed-forward part; `prefix` is that of its weights' names."""
        if f"{prefix}gate_up.weight" in weights:
            inner = self.gated(self.linear(tensor, weights, f"{prefix}gate_up"))
        elif f"{prefix}gate.weight" in weights:
            inner = self.gated(*(self.linear(tensor, weights, f"{prefix}{name}") for name in ("gate", "up")))
        else:
            inner = self.activated(self.linear(tensor, weights, f"{prefix}up"))
        inner = self.norm(inner, weights, f"{prefix}feed_forward_inner_norm")
        return self.linear(inner, weights, f"{prefix}down")

    def gated(self, gate: int, up: int | None = None) -> int:
        """The activation of the gate times `up`, which may be the second half of the gate's tensor."""
        kind = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu_erf"}.get(self.shape.activation)
        if kind is None or (kind == "geglu" and self.tensors.exact):
            if up is None:
                gate, up = self.halves(gate)
            return self.call("mul", self.activated(gate), up)
        return self.call(kind, gate) if up is None else self.call(f"{kind}_split", gate, up)

    def halves(self, tensor: int) -> tuple[int, int]:
        fields = self.ggml.ggml_tensor.from_address(tensor)
        half = fields.ne[0] // 2
        sizes, strides = (half, *fields.ne[1:3]), fields.nb[1:3]
        first, second = (self.view(tensor, sizes, strides, offset) for offset in (0, half * ITEM_BYTES))
        return self.call("cont", first), second

    def activated(self, tensor: int) -> int:
        """Apply the model's activation."""
        kind = self.shape.activation
        if kind == "xielu":
            return self.call("xielu", tensor, *self.activation_values)
        if kind == "silu":
            return self.call("silu", tensor)
        if kind == "gelu":
            return self.call("gelu_erf", tensor)
        if kind == "relu2":
            return self.call("sqr", self.call("relu", tensor))
        if not self.tensors.exact:
            return self.call("gelu", tensor)
        # equal to x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))
        factor = 2 * math.sqrt(2 / math.pi)
        inner = self.call("scale_bias", self.call("sqr", tensor), 0.044715 * factor, factor)
        return self.call("mul", tensor, self.call("sigmoid", self.call("mul", inner, tensor)))
