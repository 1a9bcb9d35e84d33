"""A layer's experts: the router's choice for each token, and the weighted sum of what the chosen ones compute."""

from __future__ import annotations

from services.stage.executors.ggml.families import ExpertFamily
from services.stage.executors.ggml.layers.operations import ITEM_BYTES, Operations

OUT_OF_REACH = 1e30  # taken from the scores of experts that cannot be chosen
LARGEST = 3.4e38  # upper end of a clamp without one


class Experts:
    """Adds the experts of all layers of a slice to one graph."""

    def __init__(self, operations: Operations, family: ExpertFamily) -> None:
        self._operations, self._family = operations, family
        self._shape = operations.shape
        self._call, self._view = operations.call, operations.view

    def mix(self, tensor: int, weights: dict[str, int]) -> int:
        """The weighted sum of each token's experts over normed hidden states [hidden_size, tokens]."""
        shape = self._shape
        tokens = int(self._operations.ggml.ggml_tensor.from_address(tensor).ne[1])
        chosen, shares = self._choose(tensor, weights, tokens)
        each = self._call("reshape_3d", tensor, shape.hidden_size, 1, tokens)
        names = ("gate_up",) if "expert_gate_up.weight" in weights else ("gate", "up")
        products = [self._product(each, chosen, weights, name) for name in names]
        inner = self._clamped(*products) if shape.gate_limit else self._operations.gated(*products)
        results = self._product(inner, chosen, weights, "down")
        total = self._sum(results, shares, tokens)
        if "shared_down.weight" not in weights:
            return total
        shared = self._operations.feed_forward(tensor, weights, "shared_")
        if "shared_router.weight" in weights:
            share = self._call("sigmoid", self._operations.product(weights["shared_router.weight"], tensor))
            shared = self._call("mul", shared, share)
        return self._call("add", total, shared)

    def _product(self, rows: int, chosen: int, weights: dict[str, int], name: str) -> int:
        """The products with a matrix of each chosen expert, plus its bias if it has one."""
        result = self._operations.expert_product(weights[f"expert_{name}.weight"], rows, chosen)
        bias = weights.get(f"expert_{name}.bias")
        return result if bias is None else self._call("add_id", result, bias, chosen)

    def _clamped(self, gate: int, up: int | None = None) -> int:
        """gate * sigmoid(steepness * gate) * (up + 1) with both clamped; `up` may be the second half of the gate's."""
        if up is None:
            gate, up = self._operations.halves(gate)
        return self._call("swiglu_oai", gate, up, self._shape.gate_steepness, self._shape.gate_limit)

    def _choose(self, tensor: int, weights: dict[str, int], tokens: int) -> tuple[int, int]:
        """Numbers of the chosen experts [chosen, tokens] and their shares [1, chosen, tokens]."""
        family, count = self._family, self._shape.experts_per_token
        outputs = self._operations.product(weights["router.weight"], tensor)
        if "router.bias" in weights:
            outputs = self._call("add", outputs, weights["router.bias"])
        if family.scores == "sparse_mixer":
            return self._sparse_mixer(outputs, tokens)
        scores = outputs
        if family.scores != "chosen_softmax":
            scores = self._call("sigmoid" if family.scores == "sigmoid" else "soft_max", outputs)
        ranking = scores
        if "router_correction" in weights:
            ranking = self._call("add", scores, weights["router_correction"])
        chosen = self._best(self._within_groups(ranking, tokens), count)
        shares = self._taken(scores, chosen, tokens)
        if family.scores == "chosen_softmax":
            shares = self._call("soft_max", self._call("reshape_2d", shares, count, tokens))
        elif self._shape.normalised_experts:
            shares = self._call("reshape_2d", shares, count, tokens)
            total = self._call("sum_rows", shares)
            if self._shape.smallest_share_sum:
                total = self._call("clamp", total, self._shape.smallest_share_sum, LARGEST)
            shares = self._call("div", shares, total)
        shares = self._operations.scaled(shares, self._shape.share_scale)
        return chosen, self._call("reshape_3d", shares, 1, count, tokens)

    def _taken(self, scores: int, chosen: int, tokens: int) -> int:
        """The scores [experts, tokens] of the chosen ones, [1, chosen, tokens]."""
        return self._call("get_rows", self._call("reshape_3d", scores, 1, self._shape.experts, tokens), chosen)

    def _within_groups(self, ranking: int, tokens: int) -> int:
        """Put all experts out of reach that are not in one of the best groups."""
        shape = self._shape
        groups, chosen_count = shape.expert_groups, shape.chosen_groups
        if groups <= 1 or chosen_count >= groups:
            return ranking
        size = shape.experts // groups
        grouped = self._call("reshape_3d", ranking, size, groups, tokens)
        best_count = min(self._family.group_best, size)
        best = self._best(self._call("reshape_2d", ranking, size, groups * tokens), best_count)
        flat = self._call("reshape_3d", ranking, 1, size, groups * tokens)
        best = self._call("reshape_2d", self._call("get_rows", flat, best), best_count, groups * tokens)
        judged = self._call("reshape_2d", self._call("sum_rows", best), groups, tokens)
        order = self._best(judged, chosen_count)
        values = self._call("get_rows", self._call("reshape_3d", judged, 1, groups, tokens), order)
        # the last chosen group's value; groups below it are left out
        least = self._view(values, (1, tokens), (chosen_count * ITEM_BYTES,), (chosen_count - 1) * ITEM_BYTES)
        below = self._call("step", self._call("neg", self._call("sub", judged, self._call("cont", least))))
        penalty = self._call("reshape_3d", self._call("scale", below, -OUT_OF_REACH), 1, groups, tokens)
        return self._call("reshape_2d", self._call("add", grouped, penalty), shape.experts, tokens)

    def _sparse_mixer(self, outputs: int, tokens: int) -> tuple[int, int]:
        """The two best experts; each one's share is its softmax over those whose outputs are nearly as large.

        The second one's share leaves the first one out.
        """
        chosen = self._best(outputs, 2)
        both = self._taken(outputs, chosen, tokens)
        size = self._call("abs", outputs)
        shares: list[int] = []
        for number in range(2):
            best = self._view(both, (1, tokens), (2 * ITEM_BYTES,), number * ITEM_BYTES)
            best = self._call("cont", best)
            above = self._call("sub", outputs, best)  # at most 0, but for the first one when the second is chosen
            over = self._call("relu", self._call("sub", size, best))
            factor = self._call("add", over, best)  # the larger of an output's size and the best output
            distance = self._call("div", self._call("neg", above), factor)
            near = self._call("step", self._call("scale_bias", distance, -1.0, 2 * self._shape.router_jitter))
            if number:
                larger = self._call("step", above)
                near = self._call("mul", near, self._call("scale_bias", larger, -1.0, 1.0))
                above = self._call("neg", self._call("relu", self._call("neg", above)))
            total = self._call("sum_rows", self._call("mul", near, self._call("exp", above)))
            shares.append(self._call("div", self._call("scale_bias", total, 0.0, 1.0), total))
        joined = self._call("concat", *shares, 0)
        return chosen, self._call("reshape_3d", joined, 1, 2, tokens)

    def _best(self, scores: int, count: int) -> int:
        """Numbers [count, tokens] of the largest of scores [any, tokens]."""
        kernels = self._operations.tensors.kernels
        if kernels is None:
            return self._call("argsort_top_k", scores, count)
        return kernels.best_experts(self._operations.context, scores, count)

    def _sum(self, results: int, shares: int, tokens: int) -> int:
        """The weighted sum over the chosen experts of [hidden_size, chosen, tokens]."""
        kernels = self._operations.tensors.kernels
        if kernels is not None:
            return kernels.sum_of_experts(self._operations.context, results, shares)
        results = self._call("mul", results, shares)
        count, row_bytes = self._shape.experts_per_token, self._shape.hidden_size * ITEM_BYTES
        sizes, strides = (self._shape.hidden_size, tokens), (row_bytes * count,)
        total = 0
        for expert in range(count):
            one = self._view(results, sizes, strides, expert * row_bytes)
            total = self._call("add", total, one) if total else one
        return total if count > 1 else self._call("cont", total)
