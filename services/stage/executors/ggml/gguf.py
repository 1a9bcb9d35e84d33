"""A GGUF's tensors as ggml computes with them, taken as they are; knows names and types of the file, no graph.

Matrices of the same inputs and the same type become one, as with safetensors: rows are quantized each alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.errors import UnsupportedModel
from services.stage.executors.ggml.shape import ModelShape
from services.stage.executors.ggml.tensor_map import Recipe
from services.stage.executors.ggml.weights import ALIGNMENT, Block, Placed, empty_blocks
from services.stage.executors.reading import ReadCounter

# architecture of the file -> model types of config.json; those whose heads llama.cpp reorders for its way of rotating
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
INTERLEAVED_ARCHITECTURES = ("llama",)

MODULES: Mapping[str, str] = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
# what a joined matrix becomes where its parts are of different types
PARTS: Mapping[str, tuple[str, ...]] = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
OTHER_CURE = "Choose weights that are made from the model's safetensors (NOODLE_WEIGHTS=q8_0, for example)."


class GgufTensors:
    """One file's tensors under the keys that transformers has for them."""

    def __init__(self, ggml: Any, path: Path, model_type: str, shape: ModelShape, counter: ReadCounter) -> None:
        from gguf import GGUFReader

        self._ggml = ggml
        self._path = path
        self._counter = counter
        try:
            reader = GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise UnsupportedModel(
                f"{path} is not a readable GGUF file ({error}).", cure="It may be cut short: fetch it again."
            ) from error
        if model_type not in ARCHITECTURES.get(architecture, ()):
            raise UnsupportedModel(
                f"{path} is of architecture {architecture!r}, from which ggml's tensors are not taken here for a "
                f"{model_type} model.",
                cure=OTHER_CURE,
            )
        self.is_interleaved = architecture in INTERLEAVED_ARCHITECTURES
        self._name_by_key = _names(shape)

    def shape_of_key(self, key: str) -> tuple[int, ...] | None:
        """Of a tensor by transformers' key, in its order; None where the file has none."""
        tensor = self._tensors.get(self._name_by_key.get(key, ""))
        return None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))

    def blocks(self, wanted: Mapping[str, Sequence[Recipe]]) -> dict[str, Block]:
        """The tensors of each name's recipes; nothing else of the file is read."""
        split = {name: self._as_stored(recipes) for name, recipes in wanted.items()}
        layouts = {name: self._layout(recipes) for name, recipes in split.items()}
        self._counter.total_bytes = sum(placed.byte_count for layout in layouts.values() for placed in layout)
        blocks = empty_blocks(layouts)
        for name, block in blocks.items():
            for recipe, placed in zip(split[name], block.tensors, strict=True):
                target = block.memory[placed.offset : placed.offset + placed.byte_count]
                done = 0
                for source in recipe.sources:
                    data = self._data(source, recipe)
                    target[done : done + len(data)] = data
                    done += len(data)
                self._counter.add(placed.byte_count)
        return blocks

    def _as_stored(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Recipes of what the file has: whole where a matrix's parts are of one type, else a recipe for each part."""
        # scaled, shifted and transposed as ggml wants it when the file was made
        plain = [replace(recipe, offset=0.0, transposed=False) for recipe in recipes]
        mixed = {
            recipe.name.partition(".")[0]
            for recipe in plain
            if recipe.is_matrix and len({self._type_of(source) for source in recipe.sources}) > 1
        }
        stored: list[Recipe] = []
        for recipe in plain:
            whole, _, kind = recipe.name.partition(".")
            if whole == "query_key_norm" and "query_key_value" in mixed:
                norms = dict.fromkeys(recipe.sources)  # each is named as often as there are heads
                names: Sequence[str] = ("query_norm", "key_norm")
                stored += [self._part(recipe, f"{name}.{kind}", key) for name, key in zip(names, norms, strict=True)]
            elif whole in mixed:
                names = PARTS[whole]
                parts = zip(names, recipe.sources, strict=True)
                stored += [self._part(recipe, f"{name}.{kind}", key) for name, key in parts]
            else:
                stored.append(recipe)
        return stored

    def _part(self, recipe: Recipe, name: str, key: str) -> Recipe:
        sizes = tuple(reversed(self.shape_of_key(key) or ()))
        return replace(recipe, name=name, sources=(key,), sizes=sizes)

    def _layout(self, recipes: Sequence[Recipe]) -> tuple[Placed, ...]:
        placed: list[Placed] = []
        offset = 0
        for recipe in recipes:
            number = self._type_of(recipe.sources[0]) if recipe.is_matrix else 0
            row_bytes = int(self._ggml.ggml_row_size(number, recipe.sizes[0]))
            byte_count = row_bytes * recipe.row_count
            placed.append(Placed(recipe.name, number, recipe.sizes, offset, byte_count))
            offset += -(-byte_count // ALIGNMENT) * ALIGNMENT
        return tuple(placed)

    def _type_of(self, key: str) -> int:
        """ggml's number of a tensor's type, known to be one that this ggml computes with."""
        tensor = self._tensors[self._name_by_key[key]]
        number = int(tensor.tensor_type)
        known = number < self._ggml.GGML_TYPE_COUNT and self._ggml.ggml_blck_size(number) > 0
        if not known or not self._is_computed(number):
            raise UnsupportedModel(
                f"tensor {tensor.name} of {self._path} is of type {tensor.tensor_type.name}, which this ggml does not "
                "compute with.",
                cure=OTHER_CURE,
            )
        if int(tensor.shape[0]) % self._ggml.ggml_blck_size(number):
            raise UnsupportedModel(
                f"tensor {tensor.name} of {self._path} has rows that are no whole blocks.", cure="Fetch it again."
            )
        return number

    def _is_computed(self, number: int) -> bool:
        """Whether the CPU's kernels multiply by a matrix of this type."""
        traits = self._ggml.ggml_type_traits_cpu.from_address(self._ggml.ggml_get_type_traits_cpu(number))
        return bool(traits.vec_dot)

    def _data(self, key: str, recipe: Recipe) -> npt.NDArray[np.uint8]:
        from gguf.quants import dequantize

        tensor = self._tensors[self._name_by_key[key]]
        data = tensor.data if recipe.is_matrix else dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def gguf_in(folder: Path) -> Path:
    """The one .gguf file of a model folder; raises UnsupportedModel when there is none, or more."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise UnsupportedModel(
            f"{folder} holds {len(found)} .gguf files, and one is needed to compute with its tensors as they are.",
            cure=OTHER_CURE,
        )
    return found[0]


def _names(shape: ModelShape) -> dict[str, str]:
    """transformers' key of every tensor -> the file's name for it."""
    family = shape.family
    names = {
        f"{family.embedding}.weight": "token_embd.weight",
        f"{family.final_norm}.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for number in range(shape.layer_count):
        prefix = family.layer.format(number)
        for module, name in MODULES.items():
            if module in family.modules:
                for kind in ("weight", "bias"):
                    names[f"{prefix}{family.modules[module]}.{kind}"] = f"blk.{number}.{name}.{kind}"
    return names
