"""Tiny models in quantized forms, packed by the formats' published layouts, beside the same values unquantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.models.tiny_model import make_tiny_model

Parts = dict[str, torch.Tensor]  # by what follows a module's name: .qweight
Packed = tuple[Parts, torch.Tensor]  # and the values that they stand for

GROUP = 32
QUANTIZED = ("proj.weight", "w1.weight", "w2.weight", "w3.weight")  # the last ones are mixtral's experts
NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


def _by_words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [..., n] as int32 words [..., n * bits / 32]; the n-th place of a word takes the code at order[n]."""
    per_word = 32 // bits
    grouped = codes.to(torch.int64).unflatten(-1, (-1, per_word))
    if order:
        grouped = grouped[..., list(order)]
    words = (grouped << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _integers(weight: torch.Tensor, bits: int, size: int, *, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes [rows, columns], zero points and float16 scales [rows, groups], and the values (code - zero) * scale."""
    rows, most = len(weight), (1 << bits) - 1
    grouped = weight.reshape(rows, -1, size)
    if symmetric:
        scales = (grouped.abs().amax(-1) / (most // 2)).half()
        zeros = torch.full_like(scales, (most + 1) // 2)
    else:
        scales = ((grouped.amax(-1) - grouped.amin(-1)) / most).half()
        zeros = (-grouped.amin(-1) / scales.float()).round().clamp(1, most).half()
    codes = ((grouped / scales.float()[..., None]).round() + zeros[..., None].float()).clamp(0, most)
    values = (codes - zeros.float()[..., None]) * scales.float()[..., None]
    return codes.reshape(rows, -1).long(), zeros.long(), scales, values.reshape(rows, -1)


def _awq(weight: torch.Tensor) -> Packed:
    codes, zeros, scales, values = _integers(weight, 4, GROUP, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {".qweight": _by_words(codes.T, 4, order), ".qzeros": _by_words(zeros.T, 4, order)}
    return {**parts, ".scales": scales.T}, values


def _gptq(weight: torch.Tensor, *, symmetric: bool = True, act_order: bool = False, raised: int = 1) -> Packed:
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3)) if act_order else torch.arange(columns)
    codes, zeros, scales, values = _integers(weight[:, order], 4, GROUP, symmetric=symmetric)
    in_place = torch.argsort(order)
    parts = {
        ".qweight": _by_words(codes[:, in_place], 4).T,
        ".qzeros": _by_words((zeros - raised).T, 4),
        ".scales": scales.T,
        ".g_idx": (in_place // GROUP).to(torch.int32),
    }
    return parts, values[:, in_place]


def _int4(weight: torch.Tensor) -> Packed:
    codes, _, scales, values = _integers(weight, 4, GROUP, symmetric=True)
    shape = torch.tensor(weight.shape)
    return {".weight_packed": _by_words(codes, 4), ".weight_scale": scales, ".weight_shape": shape}, values


def _int8(weight: torch.Tensor) -> Packed:
    codes, zeros, scales, values = _integers(weight, 8, weight.shape[1], symmetric=True)
    return {".weight": (codes - zeros).to(torch.int8), ".weight_scale": scales}, values


def _fp8(weight: torch.Tensor) -> Packed:
    """In blocks of 128 x 128 with float32 scales, cut off by the matrix's end."""
    rows, columns = weight.shape
    blocks = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    blocks[:rows, :columns] = weight
    scales = blocks.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128)).abs().amax((1, 3)) / 448
    by_item = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (weight / by_item).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scales}, codes.float() * by_item


def _fp8_rows(weight: torch.Tensor) -> Packed:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales.float()


def _nf4(weight: torch.Tensor) -> Packed:
    table = torch.tensor([float(value) for value in NF4.split()])
    runs = weight.reshape(-1, 64)
    largest = runs.abs().amax(1)
    codes = (runs[..., None] / largest[:, None, None] - table).abs().argmin(-1)
    pairs = codes.reshape(-1, 2)
    state = {"blocksize": 64, "dtype": "float16", "quant_type": "nf4", "shape": list(weight.shape)}
    parts = {
        ".weight": (pairs[:, 0] << 4 | pairs[:, 1]).to(torch.uint8)[:, None],
        ".weight.absmax": largest,
        ".weight.quant_map": table,
        ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, (table[codes] * largest[:, None]).reshape(weight.shape)


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "type": "int", **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


FORMS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, _awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, _gptq),
    "gptq act order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True},
        lambda weight: _gptq(weight, symmetric=False, act_order=True),
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda weight: _gptq(weight, symmetric=False, raised=0),
    ),
    "int4": (_compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP), _int4),
    "int8": (_compressed("int-quantized", num_bits=8, strategy="channel"), _int8),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, _fp8),
    "fp8 rows": (_compressed("float-quantized", num_bits=8, strategy="channel", type="float"), _fp8_rows),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, _nf4),
}


def quantize_model(source: Path, target: Path, form: str) -> tuple[Path, Path]:
    """Write the model in `source` quantized, and with the values of its quantized weights; return both folders.

    Matrices of layers are quantized, except those of the first layer's attention, which the config says by names.
    """
    config, pack = FORMS[form]
    quantized, plain = target / "quantized", target / "plain"
    shutil.copytree(source, quantized)
    shutil.copytree(source, plain)
    packed: Parts = {}
    values: Parts = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if key.endswith(QUANTIZED) and "layers.0.self_attn" not in key:
            parts, values[key] = pack(tensor)
            packed |= {key.removesuffix(".weight") + name: part.contiguous() for name, part in parts.items()}
        else:
            packed[key] = values[key] = tensor
    save_file(packed, quantized / "model.safetensors", {"format": "pt"})
    save_file({key: value.contiguous() for key, value in values.items()}, plain / "model.safetensors", {"format": "pt"})
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    described["quantization_config"] = {**config, "modules_to_not_convert": ["model.layers.0.self_attn", "lm_head"]}
    (quantized / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return quantized, plain


def model_with_mxfp4_experts(target: Path) -> tuple[Path, Path]:
    """Write a gpt_oss model with random experts in MXFP4, and with their values; return both folders.

    All experts are chosen: rounding would otherwise change the choice.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    quantized = make_tiny_model(
        target / "quantized",
        "gpt_oss",
        weight_scale=0.05,
        hidden_size=64,
        intermediate_size=96,
        num_experts_per_tok=4,
    )
    plain = shutil.copytree(quantized, target / "plain")
    packed: Parts = {}
    values: Parts = {}
    generator = torch.Generator().manual_seed(5)
    for key, value in load_file(quantized / "model.safetensors").items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = value.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(119, 122, (experts, rows, columns // 32), generator=generator).to(torch.uint8)
            packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            values[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            packed[key] = values[key] = value
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantized / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return quantized, plain
