"""How a checkpoint's weights are quantized, from `quantization_config` in its config.json.

The methods are those of transformers' `quantization_config.py`. All are computed as weights alone: where a method also
rounds activations, noodle does not, as transformers does not when it dequantizes. That is closer to the unquantized
model, and `Quantization.notes` says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from noodle.errors import UnsupportedModel

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
CURE = "Take the model's float16 or bfloat16 version, one that is quantized in another way, or a GGUF file of it."


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """One group of compressed-tensors: the modules that it is of, and how their weights are stored."""

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    block: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """One checkpoint's method."""

    method: str
    settings: Mapping[str, Any]  # quantization_config
    block: tuple[int, ...] | None = None  # rows and columns with one scale, of fp8
    schemes: tuple[WeightScheme, ...] = ()  # of compressed-tensors
    notes: tuple[str, ...] = field(default=())  # what is computed otherwise than the config says


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
    except (TypeError, ValueError, KeyError, AttributeError) as error:
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
    return Quantization(method, given)


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
        size = weights.get("group_size")
        block = weights.get("block_structure")
        if isinstance(block, str):
            block = block.split("x")
        yield WeightScheme(
            targets=tuple(str(target) for target in group.get("targets") or ()),
            bits=bits,
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
