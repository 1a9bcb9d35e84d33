import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from noodle.errors import ConfigurationError, ModelNotFound, NoodleError, UnsupportedModel
from noodle.model.files import model_digest
from services.planner.model_shape import read_model_shape
from tests.support.models.quantized_model import quantize_model
from tests.support.models.real_model import real_model_folder
from tests.support.models.tiny_model import LAYER_COUNT, VOCAB_SIZE, make_tiny_model

HIDDEN = 64


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in tensors.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA_TENSORS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.1.mlp.weight": (8, 4),
    "model.norm.weight": (8,),
    "lm_head.weight": (10, 8),
}


def a_llama(folder: Path, without: str = "", **changes: Any) -> Path:
    tensors = {name: shape for name, shape in LLAMA_TENSORS.items() if name != without}
    return write_folder(folder, {**LLAMA_CONFIG, **changes}, tensors)


def test_bytes_stand_where_they_are_computed(tmp_path: Path) -> None:
    shape = read_model_shape(a_llama(tmp_path))
    assert shape.layer_bytes == (8 * 8 * 4, 8 * 4 * 4)
    assert shape.embedding_bytes == 10 * 8 * 4
    assert shape.head_bytes == (8 + 10 * 8) * 4
    assert shape.stored_item_bytes == 4.0
    assert (shape.layer_count, shape.hidden_size, shape.vocab_size) == (2, 8, 10)
    assert (shape.model_type, shape.name) == ("llama", tmp_path.name)


def test_a_tied_head_counts_the_embedding_again(tmp_path: Path) -> None:
    shape = read_model_shape(a_llama(tmp_path, without="lm_head.weight"))
    assert shape.embedding_bytes == 10 * 8 * 4
    assert shape.head_bytes == (8 + 10 * 8) * 4


def test_the_context_is_the_models_own_unless_a_shorter_one_is_set(tmp_path: Path) -> None:
    folder = a_llama(tmp_path)
    assert read_model_shape(folder).context_length == 64
    assert read_model_shape(folder, 16).context_length == 16


@pytest.mark.parametrize("asked", [65, 0, -1])
def test_more_context_than_the_model_has_is_refused_with_both_numbers(tmp_path: Path, asked: int) -> None:
    with pytest.raises(ConfigurationError, match=f"NOODLE_CONTEXT_LENGTH={asked}, but .* of 64 tokens"):
        read_model_shape(a_llama(tmp_path), asked)


def test_layers_that_only_training_used_are_not_counted(tmp_path: Path) -> None:
    tensors = {**LLAMA_TENSORS, "model.layers.2.eh_proj.weight": (100, 100)}
    shape = read_model_shape(write_folder(tmp_path, LLAMA_CONFIG, tensors))
    assert shape.layer_bytes == (8 * 8 * 4, 8 * 4 * 4)
    assert shape.head_bytes == (8 + 10 * 8) * 4


def test_as_many_experts_as_layers_are_not_mistaken_for_layers(tmp_path: Path) -> None:
    experts = {f"model.layers.{layer}.experts.{expert}.w": (4, 4) for layer in range(2) for expert in range(2)}
    shape = read_model_shape(write_folder(tmp_path, LLAMA_CONFIG, {**LLAMA_TENSORS, **experts}))
    assert shape.layer_bytes == (8 * 8 * 4 + 2 * 64, 8 * 4 * 4 + 2 * 64)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2 * 2 * 2),
        ({"num_key_value_heads": None}, 2 * 4 * 2),
        ({"head_dim": 16}, 2 * 2 * 16),
        ({"qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 7}, 4 * (3 + 2 + 7)),
    ],
)
def test_kv_items_follow_the_heads(tmp_path: Path, config: dict[str, Any], expected: int) -> None:
    assert read_model_shape(a_llama(tmp_path, **config)).kv_items_per_token_per_layer == expected


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -3, 10**12, 2.5, "12", True])
def test_absurd_numbers_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=field):
        read_model_shape(a_llama(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"num_hidden_layers": 3}, "says 3 layers, but the weights hold at most 2"),
        ({"num_hidden_layers": 1}, "says 1 layers, but the weights hold layer 1 too"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_a_config_that_does_not_suit_the_weights_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_model_shape(a_llama(tmp_path, **changes))


def test_weights_without_an_embedding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no token embedding"):
        read_model_shape(a_llama(tmp_path, without="model.embed_tokens.weight"))


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen2", "gpt2", "gpt_neox", "mixtral", "phi3", "gemma2", "biogpt", "deepseek_v2", "glm4_moe"],
)
def test_every_byte_of_a_family_is_counted_at_its_place(tmp_path: Path, model_type: str) -> None:
    folder = make_tiny_model(tmp_path, model_type)
    shape = read_model_shape(folder)
    weights = load_file(folder / "model.safetensors")
    stored = sum(values.nbytes for values in weights.values())
    tied = not any("lm_head" in name or "embed_out" in name for name in weights)
    token_embedding_bytes = VOCAB_SIZE * HIDDEN * 4
    counted = sum(shape.layer_bytes) + shape.embedding_bytes + shape.head_bytes
    assert len(shape.layer_bytes) == LAYER_COUNT
    assert counted == stored + (token_embedding_bytes if tied else 0)
    assert shape.embedding_bytes >= token_embedding_bytes
    assert shape.head_bytes >= token_embedding_bytes
    assert (shape.embedding_bytes > token_embedding_bytes) is (model_type in ("gpt2", "biogpt"))  # learned positions


def test_shards_make_the_same_shape_and_digest_as_one_file(tmp_path: Path) -> None:
    whole = make_tiny_model(tmp_path / "whole", "llama")
    shards = make_tiny_model(tmp_path / "shards", "llama", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert read_model_shape(shards) == msgspec.structs.replace(read_model_shape(whole), name=shards.name)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", max_shard_size="100KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelNotFound, match=lost.name):
        read_model_shape(folder)


def test_half_precision_is_two_bytes_an_item(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", dtype="float16")
    assert read_model_shape(folder).stored_item_bytes == 2.0


def test_a_copy_has_the_same_digest_and_other_weights_another(tmp_path: Path) -> None:
    folder = a_llama(tmp_path / "one")
    copy = Path(shutil.copytree(folder, tmp_path / "two"))
    assert model_digest(copy) == model_digest(folder)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.weight"][4, 2] += 1
    save_file(weights, copy / "model.safetensors")
    assert model_digest(copy) != model_digest(folder)


def test_the_digest_sees_the_config_but_not_who_wrote_it(tmp_path: Path) -> None:
    digest = model_digest(a_llama(tmp_path / "one"))
    assert model_digest(a_llama(tmp_path / "two", transformers_version="5.0", _name_or_path="x")) == digest
    assert model_digest(a_llama(tmp_path / "three", rope_theta=5.0)) != digest


def damaged(content: bytes, damage: str) -> bytes:
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    entry = header["model.layers.1.mlp.weight"]
    if damage == "cut":
        return content[:-1]
    if damage == "empty":
        return b""
    if damage == "header length":
        return (1 << 60).to_bytes(8, "little") + content[8:]
    if damage == "noise":
        return content[:8] + bytes(reversed(content[8 : 8 + header_bytes])) + content[8 + header_bytes :]
    if damage == "shape":
        entry["shape"] = [1 << 40, 1 << 40]
    elif damage == "negative":
        entry["shape"] = [-8, -4]
    elif damage == "offsets":
        entry["data_offsets"] = [entry["data_offsets"][0] + (1 << 40), entry["data_offsets"][1] + (1 << 40)]
    elif damage == "dtype":
        entry["dtype"] = "F33"
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + header_bytes :]


@pytest.mark.parametrize("damage", ["cut", "empty", "header length", "noise", "shape", "negative", "offsets", "dtype"])
def test_a_damaged_weights_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = a_llama(tmp_path) / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors is not a complete safetensors file"):
        read_model_shape(tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "{", '{"model_type": 3}'])
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, config: str) -> None:
    a_llama(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_model_shape(tmp_path)


def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    a_llama(tmp_path)
    index = {"weight_map": {"w": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="not a safetensors file beside it"):
        read_model_shape(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoodleError, match=r"config\.json"):
        read_model_shape(tmp_path)


@pytest.mark.model
def test_the_default_models_shape_is_right() -> None:
    shape = read_model_shape(real_model_folder())
    assert (shape.layer_count, shape.hidden_size, shape.vocab_size) == (30, 576, 49152)
    assert (shape.context_length, shape.kv_items_per_token_per_layer) == (8192, 2 * 3 * 64)
    assert set(shape.layer_bytes) == {14_160_384}
    assert shape.embedding_bytes == 49152 * 576 * 4
    assert shape.head_bytes == 49152 * 576 * 4 + 576 * 4
    assert read_model_shape(real_model_folder()).digest == shape.digest


@pytest.mark.parametrize("form", ["awq", "fp8", "int4", "nf4"])
def test_layers_of_a_quantized_model_have_the_bytes_that_a_stage_will_hold(tmp_path: Path, form: str) -> None:
    source = make_tiny_model(tmp_path / "source", "llama", tie_word_embeddings=False)
    quantized, _ = quantize_model(source, tmp_path, form)
    shape, plain = read_model_shape(quantized), read_model_shape(source)
    item_bytes = {"awq": 22 / 32, "fp8": 2, "int4": 18 / 32, "nf4": 2}[form]
    norm_bytes = 2 * 64 * 4
    assert shape.layer_bytes[3] - norm_bytes == (plain.layer_bytes[3] - norm_bytes) / 4 * item_bytes
    assert (shape.embedding_bytes, shape.head_bytes) == (plain.embedding_bytes, plain.head_bytes)
