"""Which tensors ggml computes a layer with, and from which keys of a safetensors folder each is made; reads nothing.

Matrices whose inputs are the same become one: q, k and v; gate and up. Names of tensors: a module's of
ggml_families.py, and `.weight` or `.bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from noodle.errors import ModelNotFound
from services.stage.executors.ggml.shape import ModelShape

ShapeOf = Callable[[str], tuple[int, ...] | None]  # of a key as it is stored; None where there is no such tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor: the rows of its sources one after the other, each source as often as it is named."""

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]  # in ggml's order: the row's length first
    is_matrix: bool = False  # in the weights' type; else float32
    transposed: bool = False
    offset: float = 0.0

    @property
    def row_count(self) -> int:
        """Rows over all but the first dimension."""
        count = 1
        for size in self.sizes[1:]:
            count *= size
        return count


class Recipes:
    """Recipes of one model's layers and ends, checked against the shapes that its folder has."""

    def __init__(self, shape: ModelShape, shape_of_key: ShapeOf, folder: str) -> None:
        self._shape = shape
        self._shape_of_key = shape_of_key
        self._folder = folder

    def layer(self, number: int) -> list[Recipe]:
        """All tensors of a layer; raises ModelNotFound for one that is missing or of another shape."""
        shape, family = self._shape, self._shape.family
        prefix = family.layer.format(number)
        keys = {name: prefix + key for name, key in family.modules.items()}
        hidden, query, key_value = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        recipes: list[Recipe] = []
        for name in ("attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm"):
            if name in keys:
                recipes += self._norm(name, keys[name])
        fused = keys.get("query_key_value")
        parts = [fused] if fused and self._has(fused) else [keys[name] for name in ("query", "key", "value")]
        recipes += self._linear("query_key_value", parts, hidden, query + 2 * key_value)
        recipes += self._query_key_norms(keys)
        recipes += self._linear("output", [keys["output"]], query, hidden)
        if family.experts and self._has(prefix + family.experts["router"]):
            return recipes + self._experts(prefix)
        inner = self._rows_of(keys["down"], column=True)
        fused = keys.get("gate_up")
        if fused and self._has(fused):
            recipes += self._linear("gate_up", [fused], hidden, 2 * inner)
        elif "gate" in keys and self._has(keys["gate"]):
            recipes += self._linear("gate_up", [keys["gate"], keys["up"]], hidden, 2 * inner)
        else:
            recipes += self._linear("up", [keys["up"]], hidden, inner)
        return recipes + self._linear("down", [keys["down"]], inner, hidden)

    def embedding(self) -> list[Recipe]:
        """The table of tokens' embeddings; the head's too where the two are tied."""
        shape = self._shape
        return [self._matrix("embedding.weight", [shape.family.embedding], shape.hidden_size, shape.vocab_size)]

    def positions(self) -> list[Recipe]:
        """Learned positions, where the family has them."""
        shape = self._shape
        if not shape.family.positions:
            return []
        key = f"{shape.family.positions}.weight"
        return [self._checked(Recipe("positions.weight", (key,), (shape.hidden_size, shape.maximum_positions)))]

    def final_norm(self) -> list[Recipe]:
        """The norm before the head."""
        return self._norm("final_norm", self._shape.family.final_norm)

    def head(self) -> list[Recipe]:
        """The head, where it is not the embeddings."""
        if self._shape.tied:
            return []
        return self._linear("head", ["lm_head"], self._shape.hidden_size, self._shape.vocab_size)

    def _norm(self, name: str, key: str) -> list[Recipe]:
        sizes = (self._shape.hidden_size,)
        weight = Recipe(f"{name}.weight", (f"{key}.weight",), sizes, offset=self._shape.family.norm_offset)
        bias = Recipe(f"{name}.bias", (f"{key}.bias",), sizes)
        return [self._checked(weight), *([self._checked(bias)] if self._has(key, "bias") else [])]

    def _query_key_norms(self, keys: dict[str, str]) -> list[Recipe]:
        shape, family = self._shape, self._shape.family
        query, key = keys.get("query_norm", ""), keys.get("key_norm", "")
        if not query or not self._has(query):
            return []
        if family.query_key_norm == "heads":
            sources = (f"{query}.weight",) * shape.heads + (f"{key}.weight",) * shape.kv_heads
            sizes = (shape.head_dim, shape.heads + shape.kv_heads)
            return [self._checked(Recipe("query_key_norm.weight", sources, sizes, offset=family.norm_offset))]
        return [
            self._checked(Recipe(f"{name}.weight", (f"{source}.weight",), (rows,), offset=family.norm_offset))
            for name, source, rows in (
                ("query_norm", query, shape.heads * shape.head_dim),
                ("key_norm", key, shape.kv_heads * shape.head_dim),
            )
        ]

    def _experts(self, prefix: str) -> list[Recipe]:
        shape, keys = self._shape, self._shape.family.experts
        router, gate, up, down = (prefix + keys[name] for name in ("router", "gate", "up", "down"))
        inner, count, hidden = self._rows_of(gate.format(0)), shape.experts, shape.hidden_size
        both = tuple(f"{key.format(expert)}.weight" for expert in range(count) for key in (gate, up))
        downs = tuple(f"{down.format(expert)}.weight" for expert in range(count))
        return [
            self._checked(Recipe("router.weight", (f"{router}.weight",), (hidden, count))),
            self._checked(Recipe("expert_gate_up.weight", both, (hidden, 2 * inner, count), is_matrix=True)),
            self._checked(Recipe("expert_down.weight", downs, (inner, hidden, count), is_matrix=True)),
        ]

    def _linear(self, name: str, keys: list[str], inputs: int, outputs: int) -> list[Recipe]:
        recipes = [self._matrix(f"{name}.weight", keys, inputs, outputs)]
        if self._has(keys[0], "bias"):
            sources = tuple(f"{key}.bias" for key in keys)
            recipes.append(self._checked(Recipe(f"{name}.bias", sources, (outputs,))))
        return recipes

    def _matrix(self, name: str, keys: list[str], inputs: int, outputs: int) -> Recipe:
        sources = tuple(f"{key}.weight" for key in keys)
        transposed = self._shape.family.transposed and not name.startswith(("embedding", "head"))
        return self._checked(Recipe(name, sources, (inputs, outputs), is_matrix=True, transposed=transposed))

    def _has(self, key: str, kind: str = "weight") -> bool:
        return self._shape_of_key(f"{key}.{kind}") is not None

    def _rows_of(self, key: str, *, column: bool = False) -> int:
        """Outputs of a matrix, or its inputs (`column`)."""
        stored = self._stored(f"{key}.weight")
        return stored[int(column) ^ int(self._shape.family.transposed)] if len(stored) == 2 else 0

    def _stored(self, key: str) -> tuple[int, ...]:
        stored = self._shape_of_key(key)
        if stored is None:
            raise ModelNotFound(
                f"the weights in {self._folder} are not those of its config: they lack {key}.",
                cure="Fetch the folder again, and see that config and weights are of the same model.",
            )
        return stored

    def _checked(self, recipe: Recipe) -> Recipe:
        """The recipe, whose sources have its row length and together its rows."""
        rows = 0
        for source in recipe.sources:
            stored = self._stored(source)
            if recipe.transposed:
                stored = stored[::-1]
            if len(recipe.sizes) == 1:
                rows += stored[0] if len(stored) == 1 else -1
            else:
                rows += (stored[0] if len(stored) == 2 else 1) if stored and stored[-1] == recipe.sizes[0] else -1
        expected = recipe.sizes[0] if len(recipe.sizes) == 1 else recipe.row_count
        if rows != expected:
            shapes = [list(self._stored(source)) for source in dict.fromkeys(recipe.sources)]
            raise ModelNotFound(
                f"the weights in {self._folder} are not those of its config: {', '.join(dict.fromkeys(recipe.sources))}"
                f" have shapes {shapes}, where {list(recipe.sizes[::-1])} is wanted.",
                cure="Fetch the folder again, and see that config and weights are of the same model.",
            )
        return recipe


def keys_of(recipes: Iterable[Recipe]) -> list[str]:
    """Every key that recipes read, once."""
    return list(dict.fromkeys(source for recipe in recipes for source in recipe.sources))
