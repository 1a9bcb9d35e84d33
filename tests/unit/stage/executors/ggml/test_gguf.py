"""A GGUF's tensors, computed with as they are: the same logits as transformers has of their values."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from noodle.errors import ModelNotFound, UnsupportedModel
from services.stage.executors.ggml.backend import GgmlDevice
from services.stage.executors.ggml.tensor_map import GGUF_MODULES
from tests.support.models.tiny_gguf import TOKENS, TinyLlama, tiny_weights, write_tiny_gguf
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama_with_reference(tmp_path, shape):
    """A tiny GGUF, and a folder with the same values for transformers."""
    # smaller matrices: with those of tiny_weights a rounding of one would change everything after it
    weights = {key: values * 0.1 if values.ndim == 2 else values for key, values in tiny_weights(shape).items()}
    path = write_tiny_gguf(tmp_path / "a model with ü.gguf", shape, weights)
    folder = tmp_path / "model"
    LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied,
    ).save_pretrained(folder)
    for key, values in weights.items():
        if values.ndim == 2:
            weights[key] = dequantize(quantize(values, shape.dtype), shape.dtype).reshape(values.shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return path, folder


@pytest.mark.parametrize("kind", TYPES)
def test_a_llama_in_every_type_has_the_logits_of_its_values(kind, tmp_path):
    path, folder = llama_with_reference(tmp_path, TinyLlama(dtype=GGMLQuantizationType[kind]))
    sessions = random_sessions((23, 9, 14), len(TOKENS))
    expected = unsplit_logits(folder, sessions)
    # f32 activations are rounded to 8 bits before they meet quantized weights
    bound = {"F32": 1e-5, "F16": 5e-3, "BF16": 3e-2}.get(kind, 5e-2)
    for cuts in ((0, 3), (0, 1, 3)):
        pipeline = SlicePipeline(path, cuts, executor="ggml", weights="stored", context_length=128)
        assert relative_difference(pipeline.run(sessions, STEPS), expected) < bound


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_exact_computes_with_the_values_in_the_file(kind, tmp_path):
    path, folder = llama_with_reference(tmp_path, TinyLlama(dtype=GGMLQuantizationType[kind]))
    sessions = random_sessions((23, 9, 14), len(TOKENS))
    got = SlicePipeline(path, (0, 2, 3), executor="ggml", context_length=128).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < 1e-5


def as_gguf(folder, path, architecture, kinds):
    """Write a folder's tensors as a GGUF; `kinds` names the type of each module's weights, F32 where it does not."""
    keys = {key: name for name, key in MODULE_KEYS.items()}
    writer = GGUFWriter(path, architecture)
    config = json.loads((folder / "config.json").read_text())
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tensors = load_file(folder / "model.safetensors")
    for key, values in tensors.items():
        if key.startswith("model.layers."):
            _, _, number, rest = key.split(".", 3)
            module, _, part = rest.rpartition(".")
            name = f"blk.{number}.{GGUF_MODULES[keys[module]]}.{part}"
            kind = kinds.get(keys[module], "F32") if part == "weight" else "F32"
        else:
            name = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}.get(key, "output")
            name, kind = f"{name}.weight", "F32"
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            dtype = GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MODULE_KEYS = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kinds", [{}, {"value": "F16", "up": "F16"}, {"query": "F16", "gate": "F16"}])
def test_parts_of_different_types_are_computed_apart_with_their_biases_and_norms(architecture, kinds, tmp_path):
    folder = make_tiny_model(tmp_path, architecture)
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(3)
    for key, values in tensors.items():
        if values.ndim == 1:
            tensors[key] = (values + random.normal(0, 0.2, values.shape)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "model.gguf"
    as_gguf(folder, path, architecture, kinds)
    sessions = random_sessions((23, 9, 14))
    pipeline = SlicePipeline(path, (0, 2, 6), executor="ggml", weights="stored")
    bound = 5e-3 if kinds else 1e-5
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(folder, sessions)) < bound


def load(path, **options):
    return load_by_ggml(path, 0, 3, weights="stored", context_length=128, threads=1, **options)


def test_only_the_tensors_of_a_slice_are_fetched_by_their_names_in_the_file(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(tied=False))
    names = []
    load_by_ggml(path, 1, 2, weights="stored", context_length=128, threads=1, fetch=names.extend)
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    assert sorted(names) == sorted(f"blk.1.{part}.weight" for part in parts)
    names.clear()
    load_by_ggml(path, 2, 3, weights="stored", context_length=128, threads=1, fetch=names.extend)
    assert {name for name in names if not name.startswith("blk.2.")} == {"output.weight", "output_norm.weight"}


def test_files_that_contradict_themselves_are_refused(tmp_path):
    shape = TinyLlama()
    path = write_tiny_gguf(tmp_path / "model.gguf", shape)
    whole = path.read_bytes()
    for end in (100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:end])
        with pytest.raises(UnsupportedModel, match=r"model\.gguf"):
            load(path)
    weights = tiny_weights(shape)
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_tiny_gguf(path, shape, weights)
    with pytest.raises(ModelNotFound, match=r"blk\.1\.ffn_up\.weight"):
        load(path)
    write_tiny_gguf(path, replace(shape, heads=8), tiny_weights(shape))
    with pytest.raises(UnsupportedModel, match=r"rope\.dimension_count"):
        load(path)


def test_a_tensor_that_the_family_does_not_read_is_refused_by_the_stage_that_holds_its_layer(tmp_path):
    more = {"blk.1.attn_sinks.weight": np.ones(4, np.float32), "rope_freqs.weight": np.ones(8, np.float32)}
    path = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama(more_tensors=more))
    with pytest.raises(UnsupportedModel, match=r"model\.gguf holds the tensor blk\.1\.attn_sinks\.weight"):
        load(path)
    load_by_ggml(path, 2, 3, weights="stored", context_length=128, threads=1)


def test_a_type_that_the_device_does_not_multiply_by_is_named_with_its_tensor(tmp_path, monkeypatch):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(dtype=GGMLQuantizationType.Q4_1))
    monkeypatch.setattr(GgmlDevice, "multiplies", lambda self, number: number != 3)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.weight of .* is of type Q4_1"):
        load(path)
