import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from noodle.errors import UnsupportedModel
from services.coordinator.models.gguf import GgufModel, llama3_rope_parameters, write_model_folder
from tests.support.models.tiny_gguf import TinyLlama, gguf_order, tiny_weights, write_tiny_gguf


def converted(tmp_path: Path, shape: TinyLlama) -> Path:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape)
    folder = tmp_path / "converted"
    folder.mkdir()
    write_model_folder(GgufModel(path), folder, lambda _done: None)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def llama3_factors(factor: float, theta: float = 10000.0, head_dim: int = 16) -> npt.NDArray[np.float32]:
    """As llama.cpp's converter computes them, frequency by frequency."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, dtype=np.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_bit_for_bit_in_transformers_order(tmp_path: Path, tied: bool) -> None:
    shape = TinyLlama(tied=tied)
    folder = converted(tmp_path, shape)
    found, expected = load_file(folder / "model.safetensors"), tiny_weights(shape)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert config_of(folder)["tie_word_embeddings"] is tied


def test_half_precision_keeps_its_bits(tmp_path: Path) -> None:
    shape = TinyLlama(dtype=GGMLQuantizationType.F16)
    found = load_file(converted(tmp_path, shape) / "model.safetensors")
    for name, values in tiny_weights(shape).items():
        assert found[name].dtype == (np.float32 if values.ndim == 1 else np.float16)
        assert np.array_equal(found[name], values.astype(found[name].dtype))
    assert config_of(tmp_path / "converted")["dtype"] == "float16"


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    shape = TinyLlama(dtype=GGMLQuantizationType.BF16)
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    found = load_torch(converted(tmp_path, shape) / "model.safetensors")
    for name, values in tiny_weights(shape).items():
        expected = torch.from_numpy(values)
        assert torch.equal(found[name], expected if values.ndim == 1 else expected.to(torch.bfloat16)), name
    assert config_of(tmp_path / "converted")["dtype"] == "bfloat16"


def test_quantized_weights_become_the_values_they_stand_for(tmp_path: Path) -> None:
    shape = TinyLlama(dtype=GGMLQuantizationType.Q8_0)
    found = load_file(converted(tmp_path, shape) / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    values = gguf_order(name, tiny_weights(shape)[name], shape)
    stands_for = dequantize(quantize(values, shape.dtype), shape.dtype)
    assert found[name].dtype == np.float32
    assert np.array_equal(gguf_order(name, found[name], shape), stands_for)


def test_the_config_is_what_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(converted(tmp_path, TinyLlama()))
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (3, 64, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (128, 1e-5)
    assert (config.bos_token_id, config.eos_token_id) == (1, 0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling_is_carried_over(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    config = config_of(converted(tmp_path, TinyLlama(more=keys)))
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **expected}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again_in_its_divisors(tmp_path: Path, factor: float) -> None:
    shape = TinyLlama(more_tensors={"rope_freqs.weight": llama3_factors(factor)})
    assert config_of(converted(tmp_path, shape))["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_divisors_that_are_not_llama3s_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not llama 3's"):
        llama3_rope_parameters(np.array([1.0, 3.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0]), 10000.0, 16)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TinyLlama(architecture="qwen2"), "architecture 'qwen2'"),
        (TinyLlama(more={"expert_count": 8}), "mixture of experts"),
        (TinyLlama(more={"attention.sliding_window": 64}), "llama.attention.sliding_window"),
        (TinyLlama(more={"rope.scaling.type": "longrope"}), "'longrope'"),
        (TinyLlama(more={"attention.value_length": 8}), "attention.value_length is not the head dimension 16"),
        (TinyLlama(more_tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)}), "blk.0.attn_q.bias"),
        (TinyLlama(more_tensors={"blk.3.attn_norm.weight": np.zeros(64, np.float32)}), "missing or too many"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused_by_name(tmp_path: Path, shape: TinyLlama, message: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape)
    with pytest.raises(UnsupportedModel, match=message):
        GgufModel(path)


def test_another_architecture_is_sent_to_noodle_convert(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(architecture="qwen2"))
    with pytest.raises(UnsupportedModel) as caught:
        GgufModel(path)
    assert "noodle convert FILE FOLDER" in caught.value.cure


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept_share: float) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(UnsupportedModel, match=r"not a readable GGUF|missing or too many|cut short"):
        GgufModel(path)


def test_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(UnsupportedModel, match="not a readable GGUF"):
        GgufModel(path)
