"""How a checkpoint's weights are quantized, from `quantization_config` in its config.json.

The methods are those of transformers' `quantization_config.py`. All are computed as weights alone: where a method also
rounds activations, noodle does not, as transformers does not when it dequantizes. That is closer to the unquantized
model, and `Quantization.notes` says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from noodle.errors import UnsupportedModel
from noodle.model.ggml_types import GGML_TYPES
from noodle.model.tensor_entry import TensorEntry

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4")
GPTQ_FORMATS = ("gptq", "gptq_v2")
GPTQ_BITS = (2, 4, 8)
COMPRESSED_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
PACKED_BITS = (4, 8)
DENSE = ("dense", "", None)
# families whose matrices lie transposed in files (Conv1D), which quantized layouts do not keep apart
TRANSPOSED_TYPES = ("gpt2",)
ACTIVATIONS_STAY = "activations are not quantized"
BLOCK_ITEMS = 32
# what follows the name of a module or of a matrix whose codes another tensor holds
PART_SUFFIXES = (
    ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_shape", ".weight_zero_point",
    ".weight_g_idx", ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
    "_proj_scales",
)  # fmt: skip
CURE = "Take the model's float16 or bfloat16 version, one that is quantized in another way, or a GGUF file of it."


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """One group of compressed-tensors: the modules that it is of, and how their weights are stored."""

    targets: tuple[str, ...]
    bits: int
    is_symmetric: bool
    group_size: int | None
    block: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """One checkpoint's method."""

    method: str
    settings: Mapping[str, Any]  # quantization_config
    block: tuple[int, ...] | None = None  # rows and columns with one scale, of fp8
    schemes: tuple[WeightScheme, ...] = ()  # of compressed-tensors
    notes: tuple[str, ...] = ()  # what is computed otherwise than the config says

    def scheme_of(self, module: str) -> WeightScheme | None:
        """The scheme of compressed-tensors that names a module, else a pattern of it, else its class."""
        for is_match in (_is_name, _is_pattern, _is_class):
            for scheme in self.schemes:
                if any(is_match(target, module) for target in scheme.targets):
                    return scheme
        return None


def matrix_name(key: str) -> str:
    """The name of the matrix that a tensor holds the codes of; its own for any other tensor."""
    if key.endswith(".qweight"):
        return f"{key.removesuffix('.qweight')}.weight"
    return key.removesuffix("_packed").removesuffix("_blocks")


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _is_class(target: str, _module: str) -> bool:
    return not target.startswith("re:") and "." not in target


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Read how a config.json's weights are quantized, None if they are not.

    Raises UnsupportedModel for a method, layout or option that noodle does not read.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    model_type = str(config.get("model_type") or "unnamed")
    if not isinstance(given, Mapping):
        raise _refusal(model_type, "in a way that config.json does not say as an object")
    method = str(given.get("quant_method") or _method_of_old_config(given))
    if method not in METHODS:
        raise _refusal(model_type, f"by the method {method[:40]!r}; noodle reads {', '.join(METHODS)}")
    if model_type in TRANSPOSED_TYPES:
        raise _refusal(model_type, f"by {method}, and noodle reads no quantized weights of this family")
    try:
        return _READERS[method](model_type, method, given)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, re.error) as error:
        raise _refusal(
            model_type, f"by {method}, whose settings are malformed ({type(error).__name__}: {error})"
        ) from error


def _method_of_old_config(given: Mapping[str, Any]) -> str:
    is_bitsandbytes = given.get("load_in_4bit") or given.get("load_in_8bit")
    return "bitsandbytes" if is_bitsandbytes else "unknown"


def _fp8(_model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    block = given.get("weight_block_size")
    size = None if block is None else (int(block[0]), int(block[1]))
    if size is not None and min(size) < 1:
        raise ValueError(f"weight_block_size {block}")
    return Quantization(method, given, block=size, notes=(ACTIVATIONS_STAY,))


def _awq(model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    bits = int(given.get("bits", given.get("w_bit", 4)))
    if bits != 4:
        raise _refusal(model_type, f"by AWQ to {bits} bits, and AWQ is 4 bits")
    version = str(given.get("version", given.get("format", "gemm"))).lower()
    if version != "gemm" or str(given.get("backend", "")).lower() == "llm-awq":
        raise _refusal(model_type, f"by AWQ in the layout {version!r}, and noodle reads 'gemm' alone")
    settings = {**given, "group_size": int(given.get("group_size", given.get("q_group_size", 128)))}
    return Quantization(method, settings)


def _gptq(model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    bits = int(given["bits"])
    if bits not in GPTQ_BITS:
        raise _refusal(model_type, f"by GPTQ to {bits} bits, and noodle reads {', '.join(map(str, GPTQ_BITS))} bits")
    layout = str(given.get("checkpoint_format") or "gptq")
    if given.get("is_marlin_format"):
        layout = "marlin"
    if layout not in GPTQ_FORMATS:
        raise _refusal(model_type, f"by GPTQ in the layout {layout!r}, and noodle reads {' and '.join(GPTQ_FORMATS)}")
    changed = [name for name, value in dict(given.get("dynamic") or {}).items() if value and not name.startswith("-:")]
    if changed:
        raise _refusal(model_type, f"by GPTQ with other settings for some modules (dynamic: {changed[0]!r})")
    if str(given.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise _refusal(model_type, f"by GPTQ in words of {given['pack_dtype']}, and noodle reads int32")
    size = given.get("group_size")
    return Quantization(method, {**given, "group_size": -1 if size is None else int(size)})


def _bitsandbytes(_model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    is_8bit = bool(given.get("load_in_8bit") or given.get("_load_in_8bit"))
    return Quantization(method, given, notes=(ACTIVATIONS_STAY,) if is_8bit else ())


def _mxfp4(_model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    return Quantization(method, given)


def _compressed(model_type: str, method: str, given: Mapping[str, Any]) -> Quantization:
    sparsity = (given.get("sparsity_config") or {}).get("format")
    if sparsity not in DENSE:
        raise _refusal(model_type, f"and sparse ({sparsity}), which noodle does not read")
    if transforms := dict((given.get("transform_config") or {}).get("config_groups") or {}):
        raise _refusal(model_type, f"with transforms ({next(iter(transforms))}), which noodle does not compute")
    groups = dict(given.get("config_groups") or {})
    formats = [given.get("format"), *(group.get("format") for group in groups.values())]
    for each in formats:
        if each is not None and each not in COMPRESSED_FORMATS:
            raise _refusal(
                model_type,
                f"by compressed-tensors in the format {str(each)[:40]!r}, and noodle reads "
                f"{', '.join(COMPRESSED_FORMATS)}",
            )
    schemes = tuple(_schemes(model_type, groups, str(given.get("format") or "")))
    notes = [ACTIVATIONS_STAY] if any(group.get("input_activations") for group in groups.values()) else []
    if given.get("kv_cache_scheme"):
        notes.append("its scheme for the KV cache is not used")
    return Quantization(method, given, schemes=schemes, notes=tuple(notes))


def _schemes(model_type: str, groups: Mapping[str, Any], common_format: str) -> Iterator[WeightScheme]:
    for group in groups.values():
        weights = group.get("weights")
        if not weights:
            continue
        bits = int(weights["num_bits"])
        layout = group.get("format") or common_format
        if layout == "pack-quantized" and bits not in PACKED_BITS:
            raise _refusal(
                model_type,
                f"by compressed-tensors to {bits} bits, and noodle reads {' and '.join(map(str, PACKED_BITS))} bits",
            )
        if str(weights.get("strategy")) in ("tensor_group", "attn_head"):
            raise _refusal(model_type, f"by compressed-tensors with the strategy {weights['strategy']!r}")
        targets = tuple(str(target) for target in group.get("targets") or ())
        for target in targets:
            if target.startswith("re:"):
                re.compile(target.removeprefix("re:"))
        size = weights.get("group_size")
        block = weights.get("block_structure")
        if isinstance(block, str):
            block = block.split("x")
        yield WeightScheme(
            targets=targets,
            bits=bits,
            is_symmetric=bool(weights.get("symmetric", True)),
            group_size=int(size) if size and int(size) > 0 else None,
            block=None if block is None else (int(block[0]), int(block[1])),
        )


_READERS = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}


def _refusal(model_type: str, how: str) -> UnsupportedModel:
    return UnsupportedModel(f"the weights of this {model_type} model are quantized {how}.", cure=CURE)


def held_tensors(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """Tensors by name with ggml's types and bytes; those of a model that is not quantized as they are.

    A stage decides a matrix's type by the values of its scales and zero points, which a planner does not read. So a
    type is wrong where these do not allow the usual one, as with a scale that is no float16.
    Raises UnsupportedModel for a quantization that noodle does not read.
    """
    quantization = read_quantization(config)
    if quantization is None:
        return entries
    held: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        if key.endswith(PART_SUFFIXES):
            continue
        shape, type_name = _held(key, entry, quantization, entries)
        items = replace(entry, shape=shape).item_count
        kind = GGML_TYPES.get(type_name)
        byte_count = entry.byte_count if kind is None else kind.byte_count(items)
        held[matrix_name(key)] = replace(entry, dtype=type_name, shape=shape, byte_count=byte_count)
    return held


def _held(
    key: str, entry: TensorEntry, quantization: Quantization, entries: Mapping[str, TensorEntry]
) -> tuple[tuple[int, ...], str]:
    """Shape and ggml's type of a tensor, or its own if it is not quantized."""
    name, shape, settings = matrix_name(key), entry.shape, quantization.settings
    if entry.dtype in ("F8_E4M3", "F8_E5M2"):
        return shape, "F16"
    if key.endswith(".qweight") and len(shape) == 2:
        if quantization.method == "awq":
            return (shape[1] * 8, shape[0]), _of_integers(4, False, int(settings["group_size"]), shape[0])
        bits = int(settings["bits"])
        columns = shape[0] * 32 // bits
        if settings.get("desc_act"):
            return (shape[1], columns), "F16"
        group = int(settings.get("group_size", -1))
        return (shape[1], columns), _of_integers(bits, bool(settings.get("sym", True)), group, columns)
    if key.endswith("_packed") and entry.dtype == "I32" and len(shape) == 2:
        scheme = quantization.scheme_of(name.removesuffix(".weight"))
        if scheme is not None:
            columns = shape[1] * 32 // scheme.bits
            kind = _of_integers(scheme.bits, scheme.is_symmetric, scheme.group_size or -1, columns)
            return (shape[0], columns), kind
    if key.endswith(("_packed", "_blocks")) and entry.dtype == "U8":
        rows = shape[:-2] if key.endswith("_blocks") else shape[:-1]
        return (*rows, entry.byte_count * 2 // max(1, replace(entry, shape=rows).item_count)), "MXFP4"
    if entry.dtype == "I8" and f"{name}_scale" in entries:
        is_exact = entries[f"{name}_scale"].dtype in ("F16", "BF16") and f"{name}_zero_point" not in entries
        return shape, "Q8_0" if is_exact and shape[-1] % BLOCK_ITEMS == 0 else "F16"
    if entry.dtype == "I8" and f"{name.removesuffix('.weight')}.SCB" in entries:
        return shape, "F16"
    if f"{key}.absmax" in entries:
        return (1, entry.byte_count * 2), "F16"
    return shape, entry.dtype


def _of_integers(bits: int, is_symmetric: bool, group_size: int, columns: int) -> str:
    """The type of integers with float16 scales."""
    size = columns if group_size <= 0 else group_size
    if size % BLOCK_ITEMS or columns % BLOCK_ITEMS or (bits == 8 and not is_symmetric):
        return "F16"
    if bits == 8:
        return "Q8_0"
    return "Q4_0" if is_symmetric or bits < 4 else "Q5_0"
