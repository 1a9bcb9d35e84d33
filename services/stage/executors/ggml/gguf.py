"""Reads a GGUF file's tensors in the types that it stores.

Matrices with the same input and the same type are joined, as with safetensors: each row is quantized on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noodle.errors import UnsupportedModel
from services.stage.executors.base import ReadCounter
from services.stage.executors.ggml.families import ModelShape
from services.stage.executors.ggml.tensor_map import TensorSource
from services.stage.executors.ggml.weights import TYPE_NUMBERS, WeightBlock, empty_blocks, layout_of

# architecture of the file -> model types of config.json
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
INTERLEAVED_ARCHITECTURES = ("llama",)  # llama.cpp reorders their heads for its rotary pairs

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
# the parts of a joined matrix, kept apart if their types differ
PARTS: Mapping[str, tuple[str, ...]] = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
OTHER_CURE = "Choose weights made from the model's safetensors (for example NOODLE_WEIGHTS=q8_0)."


class GgufTensors:
    """One file's tensors by transformers' keys."""

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
                f"{path} is of architecture {architecture!r}, whose tensors noodle does not use for a "
                f"{model_type} model.",
                cure=OTHER_CURE,
            )
        self.is_interleaved = architecture in INTERLEAVED_ARCHITECTURES
        self._name_by_key = _names(shape)

    def shape_of_key(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor in transformers' order; None if the file lacks it."""
        tensor = self._tensors.get(self._name_by_key.get(key, ""))
        return None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))

    def blocks(self, wanted: Mapping[str, Sequence[TensorSource]]) -> dict[str, WeightBlock]:
        """Blocks with the tensors of each name; nothing else of the file is read."""
        split = {name: self._as_stored(tensors) for name, tensors in wanted.items()}
        layouts = {name: layout_of(self._ggml, tensors, self._type_number) for name, tensors in split.items()}
        self._counter.total_bytes = sum(tensor.byte_count for layout in layouts.values() for tensor in layout)
        blocks = empty_blocks(layouts)
        for name, block in blocks.items():
            for tensor, layout in zip(split[name], block.tensors, strict=True):
                target, done = block.bytes_of(layout), 0
                for key in tensor.sources:
                    data = self._data(key, tensor)
                    target[done : done + len(data)] = data
                    done += len(data)
                self._counter.add(layout.byte_count)
        return blocks

    def _as_stored(self, tensors: Sequence[TensorSource]) -> list[TensorSource]:
        """The tensors in the file's types: a joined matrix is split where its parts have different types."""
        # the file's writer has scaled, shifted and transposed them for ggml
        plain = [replace(tensor, offset=0.0, transposed=False) for tensor in tensors]
        mixed = {
            tensor.name.partition(".")[0]
            for tensor in plain
            if tensor.is_matrix and len({self._type_of(key) for key in tensor.sources}) > 1
        }
        stored: list[TensorSource] = []
        for tensor in plain:
            whole, _, kind = tensor.name.partition(".")
            if whole == "query_key_norm" and "query_key_value" in mixed:
                # each norm is a source as often as there are heads
                stored += self._parts(tensor, ("query_norm", "key_norm"), kind, tuple(dict.fromkeys(tensor.sources)))
            elif whole in mixed:
                stored += self._parts(tensor, PARTS[whole], kind, tensor.sources)
            else:
                stored.append(tensor)
        return stored

    def _parts(
        self, tensor: TensorSource, names: Sequence[str], kind: str, keys: Sequence[str]
    ) -> Iterator[TensorSource]:
        for name, key in zip(names, keys, strict=True):
            sizes = tuple(reversed(self.shape_of_key(key) or ()))
            yield replace(tensor, name=f"{name}.{kind}", sources=(key,), sizes=sizes)

    def _type_number(self, tensor: TensorSource) -> int:
        return self._type_of(tensor.sources[0]) if tensor.is_matrix else TYPE_NUMBERS["f32"]

    def _type_of(self, key: str) -> int:
        """ggml's number of a tensor's type; raises UnsupportedModel if this ggml does not compute with it."""
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
                f"tensor {tensor.name} of {self._path} has rows that are not whole blocks.", cure="Fetch it again."
            )
        return number

    def _is_computed(self, number: int) -> bool:
        """Whether the CPU's kernels multiply by matrices of this type."""
        traits = self._ggml.ggml_type_traits_cpu.from_address(self._ggml.ggml_get_type_traits_cpu(number))
        return bool(traits.vec_dot)

    def _data(self, key: str, source: TensorSource) -> npt.NDArray[np.uint8]:
        from gguf.quants import dequantize

        tensor = self._tensors[self._name_by_key[key]]
        data = tensor.data if source.is_matrix else dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def gguf_in(folder: Path) -> Path:
    """The .gguf file of a model folder; raises UnsupportedModel unless there is exactly one."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise UnsupportedModel(
            f"{folder} holds {len(found)} .gguf files, and NOODLE_WEIGHTS=gguf needs exactly one.", cure=OTHER_CURE
        )
    return found[0]


def _names(shape: ModelShape) -> dict[str, str]:
    """The file's names of all tensors, by transformers' keys."""
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
