"""A GGUF's tensors, computed with as they are: the same logits as from the safetensors that were made of them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file, save_file

from noodle.errors import ModelNotFound, UnsupportedModel
from services.coordinator.models.store import prepare_model
from services.stage.executors.ggml.gguf import MODULES
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


def converted(tmp_path, shape):
    """The folder that the model store makes of a tiny GGUF, with the GGUF beside."""
    # smaller matrices: with those of tiny_weights a rounding of one would change everything after it
    weights = {key: values * 0.1 if values.ndim == 2 else values for key, values in tiny_weights(shape).items()}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape, weights)
    folder = prepare_model(str(path), tmp_path / "cache", lambda progress: None).folder
    return shutil.copytree(folder, tmp_path / "model"), path


@pytest.mark.parametrize("kind", TYPES)
def test_a_llama_in_every_type_is_what_its_conversion_is(kind, tmp_path):
    folder, path = converted(tmp_path, TinyLlama(dtype=GGMLQuantizationType[kind]))
    shutil.copy(path, folder)
    sessions = random_sessions((23, 9, 14), len(TOKENS))
    expected = unsplit_logits(folder, sessions)
    # f32 activations are rounded to 8 bits before they meet quantized weights
    bound = {"F32": 1e-5, "F16": 5e-3, "BF16": 3e-2}.get(kind, 5e-2)
    for cuts in ((0, 3), (0, 1, 3)):
        pipeline = SlicePipeline(folder, cuts, executor="ggml", weights="gguf", context_length=128)
        assert relative_difference(pipeline.run(sessions, STEPS), expected) < bound


def as_gguf(folder, path, architecture, kinds):
    """Write a folder's tensors as a GGUF; `kinds` names the type of each module's weights, F32 where it does not."""
    keys = {key: name for name, key in MODULE_KEYS.items()}
    writer = GGUFWriter(path, architecture)
    tensors = load_file(folder / "model.safetensors")
    for key, values in tensors.items():
        if key.startswith("model.layers."):
            _, _, number, rest = key.split(".", 3)
            module, _, part = rest.rpartition(".")
            name = f"blk.{number}.{MODULES[keys[module]]}.{part}"
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
    as_gguf(folder, folder / "model.gguf", architecture, kinds)
    sessions = random_sessions((23, 9, 14))
    pipeline = SlicePipeline(folder, (0, 2, 6), executor="ggml", weights="gguf")
    bound = 5e-3 if kinds else 1e-5
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(folder, sessions)) < bound


def load(folder, **options):
    return load_by_ggml(folder, 0, 3, weights="gguf", context_length=128, threads=1, **options)


def test_a_gguf_that_can_not_be_computed_with_is_named(tmp_path):
    shape = TinyLlama()
    folder, path = converted(tmp_path, shape)
    (folder / path.name).unlink()
    with pytest.raises(UnsupportedModel, match="holds 0") as refusal:
        load(folder)
    assert "NOODLE_WEIGHTS" in refusal.value.cure
    whole = path.read_bytes()
    for end in (100, len(whole) // 2, len(whole) - 100):
        (folder / "model.gguf").write_bytes(whole[:end])
        with pytest.raises(UnsupportedModel, match="not a readable GGUF"):
            load(folder)
    write_tiny_gguf(folder / "model.gguf", replace(shape, architecture="gptneox"))
    with pytest.raises(UnsupportedModel, match="gptneox"):
        load(folder)
    write_tiny_gguf(folder / "model.gguf", replace(shape, hidden=128))
    with pytest.raises(ModelNotFound, match="needed"):
        load(folder)


def test_a_type_of_tensor_that_ggml_lacks_is_named(tmp_path, monkeypatch):
    folder, path = converted(tmp_path, TinyLlama(dtype=GGMLQuantizationType.Q4_1))
    shutil.copy(path, folder)
    monkeypatch.setattr("services.stage.executors.ggml.gguf.GgufTensors._is_computed", lambda self, number: number != 3)
    with pytest.raises(UnsupportedModel, match="Q4_1, which this ggml does not"):
        load(folder)
