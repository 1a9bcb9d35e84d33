"""FP8 and MXFP4 have the values that transformers reads, and what is not a whole matrix is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from noodle.errors import NoodleError, UnsupportedModel
from noodle.model.quantization import Quantization, read_quantization
from services.stage.executors.checkpoints.folder import QuantizedFolder
from services.stage.executors.checkpoints.numbers import SMALL_FLOATS, to_float16

Tensors = dict[str, torch.Tensor]


def folder_of(path: Path, tensors: Tensors, **config: Any) -> QuantizedFolder:
    save_file(tensors, path / "model.safetensors")
    quantization = read_quantization({"model_type": "llama", "quantization_config": config})
    assert isinstance(quantization, Quantization)
    return QuantizedFolder(path, quantization, is_exact=True)


def float32_of(files: QuantizedFolder, name: str) -> np.ndarray:
    entry = files.find(name)
    assert entry is not None
    data = np.empty(entry.byte_count, np.uint8)
    files.read(name, data.data, 0)
    if entry.dtype == "MXFP4":
        return dequantize(data.reshape(-1, entry.shape[-1] // 32 * 17), GGMLQuantizationType.MXFP4).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
    return data.view("<f2" if entry.dtype == "F16" else "<f4").astype(np.float32).reshape(entry.shape)


def codes(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_code_of_an_8_bit_float_has_torchs_value(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(SMALL_FLOATS[name], expected)


def test_every_power_of_two_scale_has_torchs_value() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(SMALL_FLOATS["F8_E8M0"], expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_shape", [(3, 2), (384, 1), (1, 1)])
def test_fp8_with_scales_of_blocks_rows_or_the_whole_is_transformers_value(
    tmp_path: Path, scale_shape: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    weight, scale = codes(384, 256), (torch.rand(scale_shape) * 1e-3).to(scale_dtype)
    block = [128, 128] if scale_shape == (3, 2) else None
    files = folder_of(
        tmp_path, {"m.weight": weight, "m.weight_scale_inv": scale}, quant_method="fp8", weight_block_size=block
    )
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.float(), torch.float32)
    np.testing.assert_array_equal(float32_of(files, "m.weight"), expected.numpy())


def test_fp8_blocks_may_be_cut_off_by_the_end_of_the_matrix(tmp_path: Path) -> None:
    weight, scale = codes(200, 160), torch.rand(2, 2) * 1e-3
    files = folder_of(
        tmp_path, {"m.weight": weight, "m.weight_scale_inv": scale}, quant_method="fp8", weight_block_size=[128, 128]
    )
    by_item = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :160]
    np.testing.assert_array_equal(float32_of(files, "m.weight"), (weight.float() * by_item).numpy())


def test_fp8_with_powers_of_two_as_scales_is_exact_in_16_bits(tmp_path: Path) -> None:
    scale = torch.tensor([[2.0**-9, 2.0**-10]])
    tensors = {"m.weight": codes(128, 256), "m.weight_scale_inv": scale}
    files = folder_of(tmp_path, tensors, quant_method="fp8", weight_block_size=[128, 128])
    entry = files.find("m.weight")
    assert entry is not None
    assert entry.dtype == "F16"
    expected = tensors["m.weight"].float() * scale.repeat_interleave(128, 1)
    np.testing.assert_array_equal(float32_of(files, "m.weight"), expected.numpy())
    assert files.description(["m.weight"]) == "read from FP8 as f16; activations are not quantized"


def test_fbgemm_has_a_scale_for_each_row(tmp_path: Path) -> None:
    tensors = {"m.weight": codes(64, 32), "m.weight_scale": torch.rand(64, 1) * 1e-2}
    files = folder_of(tmp_path, tensors, quant_method="fbgemm_fp8")
    expected = tensors["m.weight"].float() * tensors["m.weight_scale"]
    np.testing.assert_array_equal(float32_of(files, "m.weight"), expected.numpy())


def test_experts_in_mxfp4_are_ggmls_blocks_with_transformers_values(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), generator=generator).to(torch.uint8)
    tensors = {"m.experts.down_proj_blocks": blocks, "m.experts.down_proj_scales": scales}
    files = folder_of(tmp_path, tensors, quant_method="mxfp4")
    values = float32_of(files, "m.experts.down_proj")
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    np.testing.assert_array_equal(values, expected.transpose(1, 2).numpy())
    assert files.description(["m.experts.down_proj"]) == "read from MXFP4 as MXFP4"


def test_tensors_that_are_not_quantized_are_read_as_stored(tmp_path: Path) -> None:
    embedding = torch.randn(8, 4, dtype=torch.bfloat16)
    files = folder_of(tmp_path, {"e.weight": embedding}, quant_method="fp8", modules_to_not_convert=["e"])
    np.testing.assert_array_equal(float32_of(files, "e.weight"), embedding.float().numpy())
    assert files.stored_names("e.weight") == ("e.weight",)
    assert files.description(["e.weight"]) == ""
    assert files.find("missing.weight") is None


def test_a_matrix_whose_scales_are_no_float16_is_rounded_instead_of_packed(tmp_path: Path) -> None:
    packed = torch.zeros(4, 8, dtype=torch.int32)
    tensors = {
        "m.weight_packed": packed,
        "m.weight_scale": torch.full((4, 2), 1 / 3, dtype=torch.float32),
        "m.weight_shape": torch.tensor([4, 64]),
    }
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}}
    files = folder_of(
        tmp_path, tensors, quant_method="compressed-tensors", format="pack-quantized", config_groups=groups
    )
    entry = files.find("m.weight")
    assert entry is not None
    assert entry.dtype == "F32"
    np.testing.assert_array_equal(float32_of(files, "m.weight"), np.full((4, 64), np.float32(1 / 3) * -8))


def gptq(**changed: torch.Tensor) -> Tensors:
    tensors = {
        "m.qweight": torch.zeros(8, 16, dtype=torch.int32),
        "m.qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "m.scales": torch.ones(2, 16, dtype=torch.float16),
        "m.g_idx": (torch.arange(64) // 32).to(torch.int32),
    }
    return {key: value for key, value in {**tensors, **changed}.items() if value.numel()}


def int8(scale: torch.Tensor) -> Tensors:
    return {"m.weight": torch.arange(-128, 128).to(torch.int8).reshape(4, 64), "m.weight_scale": scale}


def test_one_scale_of_the_whole_matrix_is_in_every_block(tmp_path: Path) -> None:
    tensors = int8(torch.tensor([0.5]))
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "tensor"}}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    files = folder_of(tmp_path, tensors, **config)
    entry = files.find("m.weight")
    assert entry is not None
    assert entry.dtype == "Q8_0"
    data = np.empty(entry.byte_count, np.uint8)
    files.read("m.weight", data.data, 0)
    values = dequantize(data.reshape(4, -1), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(values, tensors["m.weight"].numpy() * np.float32(0.5))


NONE = torch.empty(0)
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}}},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BROKEN: list[tuple[dict[str, Any], Tensors, str]] = [
    (GPTQ, gptq(**{"m.scales": NONE}), "m.scales is missing"),
    (GPTQ, gptq(**{"m.qzeros": NONE}), "m.qzeros is missing"),
    (GPTQ, gptq(**{"m.scales": torch.ones(3, 16)}), r"m.scales has shape \[3, 16\], but \[2, 16\] is needed"),
    (GPTQ, gptq(**{"m.qzeros": torch.zeros(2, 3, dtype=torch.int32)}), r"m.qzeros has shape \[2, 3\]"),
    (GPTQ, gptq(**{"m.qweight": torch.zeros(8, 16)}), "m.qweight is stored as F32 instead of I32"),
    (GPTQ, gptq(**{"m.g_idx": torch.full((64,), 2, dtype=torch.int32)}), "m.g_idx names groups outside 0 to 1"),
    (GPTQ, gptq(**{"m.g_idx": torch.zeros(63, dtype=torch.int32)}), r"m.g_idx has shape \[63\]"),
    (GPTQ, gptq(**{"m.scales": torch.full((2, 16), torch.inf)}), "m.scales holds numbers that are not finite"),
    (GPTQ, gptq(**{"m.qweight": torch.zeros(128, dtype=torch.int32)}), "which is no matrix"),
    (INT8, {"m.weight_packed": torch.zeros(4, 3, dtype=torch.int32)}, "packed in 3 bits"),
    (INT8, int8(torch.full((4, 1), torch.nan)), "not finite"),
    (FP8, {"m.weight": codes(128, 128)}, "m.weight_scale_inv is missing"),
    (FP8, {"m.weight": codes(128, 128), "m.weight_scale_inv": torch.ones(2)}, "does not fit"),
    (FP8, {"m.weight": codes(128, 128), "m.weight_scale_inv": torch.ones(2, 1)}, "does not fit"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"m.weight": torch.zeros(8, 1, dtype=torch.uint8)},
        "bitsandbytes__nf4 is missing",
    ),
    (
        {"quant_method": "mxfp4"},
        {"m.weight_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8)},
        "m.weight_scales is missing",
    ),
    (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        {"m.weight": torch.zeros(4, 32, dtype=torch.int8)},
        "no group in config.json's quantization_config names it",
    ),
]


@pytest.mark.parametrize(("config", "tensors", "message"), BROKEN)
def test_an_incomplete_matrix_is_refused_with_the_tensor(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, message: str
) -> None:
    files = folder_of(tmp_path, tensors, **config)
    with pytest.raises(NoodleError, match=message) as refused:
        files.find("m.weight")
    assert refused.value.cure


def test_a_git_lfs_pointer_instead_of_the_file_is_named_with_its_cure(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(NoodleError, match="Git LFS pointer") as refused:
        QuantizedFolder(tmp_path, Quantization("awq", {}))
    assert "git lfs pull" in str(refused.value.cure)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, gptq(), **GPTQ)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(NoodleError, match=r"not a complete safetensors file: .* lies beyond the end of the file"):
        QuantizedFolder(tmp_path, Quantization("gptq", GPTQ))


def test_awq_that_scales_activations_is_refused_by_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"divides activations by m\.act\.scales"):
        folder_of(tmp_path, {"m.act.scales": torch.ones(4)}, quant_method="awq")


def test_float16_is_numpys_up_to_one_unit_of_subnormal_numbers() -> None:
    generator = np.random.default_rng(7)
    values = np.ldexp(generator.uniform(-1, 1, 1 << 16), generator.integers(-30, 18, 1 << 16)).astype(np.float32)
    halfway = np.arange(0x0401, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halfway[:-1] + halfway[1:]) / 2
    values = np.concatenate([values, ties, -ties, np.array([0, -0.0, 65504, 65519, 65520, 1e30], np.float32)])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    got = to_float16(values).view(np.float16)
    is_normal = np.abs(values) >= 2.0**-14
    np.testing.assert_array_equal(got[is_normal], expected[is_normal])
    np.testing.assert_allclose(got[~is_normal].astype(float), expected[~is_normal].astype(float), atol=2.0**-24)


def test_every_float16_is_itself() -> None:
    every = np.arange(0x7C01, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(to_float16(every.astype(np.float32)).view(np.float16), every)
