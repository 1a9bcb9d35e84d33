"""Which quantized checkpoints are read, and which are refused by name."""

from typing import Any

import pytest

from noodle.errors import UnsupportedModel
from noodle.model.quantization import read_quantization


def group(**weights: Any) -> dict[str, Any]:
    return {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 128, **weights},
        }
    }


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": group()}

# the quantization_config of published models
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B-FP8": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "deepseek-ai/DeepSeek-V3.1": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "Qwen/Qwen2.5-0.5B-Instruct-AWQ": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
    "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4": {
        "bits": 4,
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": 128,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    },
    "unsloth bnb 4bit": {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    },
    "openai/gpt-oss-20b": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "RedHatAI w4a16": {
        **COMPRESSED,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.3",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str) -> None:
    quantization = read_quantization({"model_type": "llama", "quantization_config": PUBLISHED[name]})
    assert quantization is not None
    assert quantization.method == PUBLISHED[name]["quant_method"]


def test_a_config_without_quantization_is_none() -> None:
    assert read_quantization({"model_type": "llama"}) is None
    assert read_quantization({"model_type": "llama", "quantization_config": None}) is None


def test_what_is_left_out_is_said() -> None:
    quantization = read_quantization(
        {
            "model_type": "llama",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"g": {**group(num_bits=8)["group_0"], "input_activations": {"num_bits": 8}}},
                "kv_cache_scheme": {"num_bits": 8},
            },
        }
    )
    assert quantization is not None
    assert quantization.notes == ("activations are not quantized", "its scheme for the KV cache is not used")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "hqq"}, "by the method 'hqq'"),
        ({"bits": 4}, "by the method 'unknown'"),
        ("fp8", "config.json does not say as an object"),
        ({"quant_method": "gptq", "bits": 3}, "by GPTQ to 3 bits"),
        ({"quant_method": "gptq"}, "settings are malformed"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "settings are malformed"),
        ({**COMPRESSED, "config_groups": {"g": {**group()["group_0"], "targets": ["re:("]}}}, "settings are malformed"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {r".*down.*": {"bits": 8}}}, "other settings for some modules"),
        ({"quant_method": "awq", "bits": 3}, "by AWQ to 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "settings are malformed"),
        ({**COMPRESSED, "config_groups": group(num_bits=3)}, "to 3 bits"),
        ({**COMPRESSED, "format": "marlin-24"}, "format 'marlin-24'"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({**COMPRESSED, "transform_config": {"config_groups": {"R1": {}}}}, r"transforms \(R1\)"),
        ({**COMPRESSED, "config_groups": {"g": {"weights": {}}, "h": 3}}, "settings are malformed"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason_and_a_cure(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refused:
        read_quantization({"model_type": "llama", "quantization_config": config})
    assert refused.value.cure


def test_a_family_with_transposed_matrices_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no quantized weights of this family"):
        read_quantization({"model_type": "gpt2", "quantization_config": PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct-AWQ"]})
