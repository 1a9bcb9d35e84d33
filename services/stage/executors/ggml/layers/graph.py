"""A slice's graph for every family of families.py: embedding, layers, head.

Activations are float32 [features, tokens] in ggml's order.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.stage.executors.ggml.graph import GraphMemory, SlotTensors
from services.stage.executors.ggml.layers.attention import Attention
from services.stage.executors.ggml.layers.operations import ITEM_BYTES, Operations, SliceTensors
from services.stage.executors.ggml.shape import ModelShape


class LayerGraph(Operations):
    """Builds the operations of one step into a graph's memory."""

    def __init__(self, memory: GraphMemory, shape: ModelShape, tensors: SliceTensors, start_layer: int) -> None:
        super().__init__(memory, shape, tensors)
        self._start_layer = start_layer
        self.slots = SlotTensors()  # of the sessions' rows, once `layers` has been called

    def embed(self, token_ids: int) -> int:
        """Token embeddings, scaled as the family does."""
        embedding, kernels = self.tensors.embedding, self.tensors.kernels
        if kernels is not None and embedding in self.tensors.packed:
            taken = kernels.take_rows(self.context, embedding, token_ids)
        else:
            taken = self.call("get_rows", embedding, token_ids)
        return self.scaled(taken, self.shape.token_scale)

    def enter(self, hidden: int, positions: int) -> int:
        """Apply what a family does to the input of its first layer."""
        hidden = self.scaled(hidden, self.shape.input_scale)
        if self.tensors.positions:
            hidden = self.call("add", hidden, self.call("get_rows", self.tensors.positions, positions))
        return hidden

    def layers(self, hidden: int, positions: int, counts: Sequence[int]) -> int:
        """All layers of the slice, over spans of these token counts."""
        shape = self.shape
        attention = Attention(self, self._start_layer, positions, counts)
        self.slots = attention.slots
        for number, weights in enumerate(self.tensors.layers):
            attended = attention.attend(self.norm(hidden, weights, "attention_norm"), number, weights)
            attended = self.norm(attended, weights, "attention_post_norm")
            hidden = self.call("add", hidden, self.scaled(attended, shape.residual_scale))
            inner = self.norm(hidden, weights, "feed_forward_norm")
            inner = self._experts(inner, weights) if "router.weight" in weights else self._feed_forward(inner, weights)
            inner = self.norm(inner, weights, "feed_forward_post_norm")
            hidden = self.call("add", hidden, self.scaled(inner, shape.residual_scale))
        return hidden

    def head(self, hidden: int) -> int:
        """Logits of hidden states, scaled and capped as the family does."""
        shape = self.shape
        logits = self.linear(self.norm(hidden, self.tensors.final_norm, "final_norm"), self.tensors.head, "head")
        logits = self.scaled(logits, shape.logit_scale)
        if shape.logit_cap:
            capped = self.call("tanh", self.scaled(logits, 1 / shape.logit_cap))
            logits = self.scaled(capped, shape.logit_cap)
        return logits

    def _feed_forward(self, tensor: int, weights: dict[str, int]) -> int:
        if "gate_up.weight" in weights:
            inner = self.gated(self.linear(tensor, weights, "gate_up"))
        elif "gate.weight" in weights:
            inner = self.gated(self.linear(tensor, weights, "gate"), self.linear(tensor, weights, "up"))
        else:
            inner = self.activated(self.linear(tensor, weights, "up"))
        return self.linear(inner, weights, "down")

    def _experts(self, tensor: int, weights: dict[str, int]) -> int:
        """The weighted sum of the experts that the router chooses for each token."""
        shape = self.shape
        tokens = int(self.ggml.ggml_tensor.from_address(tensor).ne[1])
        chosen_count = shape.experts_per_token
        shares = self.call("soft_max", self.call("mul_mat", weights["router.weight"], tensor))
        chosen = self.call("argsort_top_k", shares, chosen_count)
        shares = self.call("get_rows", self.call("reshape_3d", shares, 1, shape.experts, tokens), chosen)
        if shape.normalised_experts:
            shares = self.call("reshape_2d", shares, chosen_count, tokens)
            shares = self.call("div", shares, self.call("sum_rows", shares))
            shares = self.call("reshape_3d", shares, 1, chosen_count, tokens)
        each = self.call("reshape_3d", tensor, shape.hidden_size, 1, tokens)
        names = ("gate_up",) if "expert_gate_up.weight" in weights else ("gate", "up")
        inner = self.gated(*(self.call("mul_mat_id", weights[f"expert_{name}.weight"], each, chosen) for name in names))
        results = self.call("mul", self.call("mul_mat_id", weights["expert_down.weight"], inner, chosen), shares)
        row_bytes = shape.hidden_size * ITEM_BYTES
        sizes, strides = (shape.hidden_size, tokens), (row_bytes * chosen_count,)
        total = 0
        for expert in range(chosen_count):
            one = self.view(results, sizes, strides, expert * row_bytes)
            total = self.call("add", total, one) if total else one
        return total if chosen_count > 1 else self.call("cont", total)
