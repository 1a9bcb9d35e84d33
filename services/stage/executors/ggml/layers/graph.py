"""A slice's graph for every family of families.py: embedding, layers, head.

Activations are float32 [features, tokens] in ggml's order.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.stage.executors.ggml.graph import GraphMemory, SlotTensors
from services.stage.executors.ggml.kernels.attention import StepSpans
from services.stage.executors.ggml.layers.attention import Attention
from services.stage.executors.ggml.layers.experts import Experts
from services.stage.executors.ggml.layers.operations import Operations, SliceTensors
from services.stage.executors.ggml.shape import ModelShape


class LayerGraph(Operations):
    """Builds the operations of one step into a graph's memory."""

    def __init__(self, memory: GraphMemory, shape: ModelShape, tensors: SliceTensors, start_layer: int) -> None:
        super().__init__(memory, shape, tensors)
        self._start_layer = start_layer
        # once `layers` has been called, one of the two tells where the sessions' rows are
        self.slots = SlotTensors()
        self.spans: StepSpans | None = None

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
        """All layers of the slice, over spans of these token counts; noodle's attention cuts all tokens itself."""
        shape = self.shape
        attention = Attention(self, self._start_layer, positions, counts)
        experts = Experts(self, shape.family.experts) if shape.family.experts else None
        self.slots, self.spans = attention.slots, attention.spans
        for number, weights in enumerate(self.tensors.layers):
            if self.tensors.activation_values:
                self.activation_values = self.tensors.activation_values[number]
            normed = self.norm(hidden, weights, "attention_norm")
            attended = self.norm(attention.attend(normed, number, weights), weights, "attention_post_norm")
            whole = self.call("add", hidden, self.scaled(attended, shape.residual_scale))
            if shape.parallel:
                is_shared = "feed_forward_norm.weight" not in weights  # one norm for both parts
                inner = normed if is_shared else self.norm(hidden, weights, "feed_forward_norm")
            else:
                inner = self.norm(whole, weights, "feed_forward_norm")
            if experts is not None and "router.weight" in weights:
                inner = experts.mix(inner, weights)
            else:
                inner = self.feed_forward(inner, weights)
            inner = self.norm(inner, weights, "feed_forward_post_norm")
            hidden = self.call("add", whole, self.scaled(inner, shape.residual_scale))
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
