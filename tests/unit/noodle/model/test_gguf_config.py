"""A GGUF header read as a config.json: what llama.cpp's keys mean, and keys that would change the text unread."""

import json

import numpy as np
import pytest
from gguf import GGUFWriter

from noodle.errors import UnsupportedModel
from noodle.model.configs.architectures import ARCHITECTURES
from noodle.model.gguf import read_gguf
from noodle.model.gguf_config import gguf_config

HIDDEN, HEADS, LAYERS, VOCABULARY = 64, 4, 3, 50
KEYS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def write(path, keys=None, *, architecture="llama", without=(), tensors=()):
    """A header with the common keys, embeddings, a tensor of each layer, and further keys and tensors."""
    writer = GGUFWriter(path, architecture)
    for key, value in {**KEYS, **(keys or {})}.items():
        if key in without:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, HIDDEN), np.float32))
    for number in range(LAYERS):
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.ones(HIDDEN, np.float32))
    for name in tensors:
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(tmp_path, keys=None, **options):
    return gguf_config(read_gguf(write(tmp_path / "model.gguf", keys, **options)))


def test_the_keys_have_the_names_of_config_json(tmp_path):
    config = config_of(tmp_path)
    assert config["model_type"] == "llama"
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (LAYERS, HIDDEN, VOCABULARY)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, 2, 16)
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert json.loads(json.dumps(config)) == config
    config = config_of(tmp_path, tensors=["output.weight"], without=["attention.head_count_kv"])
    assert config["tie_word_embeddings"] is False
    assert config["num_key_value_heads"] == HEADS


def test_a_llama_with_experts_is_mixtral_and_one_with_windows_is_mistral(tmp_path):
    config = config_of(tmp_path, {"expert_count": 8, "expert_used_count": 2}, tensors=["blk.0.ffn_gate_inp.weight"])
    assert config["model_type"] == "mixtral"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    config = config_of(tmp_path, {"attention.sliding_window": 100})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 100)


@pytest.mark.parametrize(
    ("keys", "tensors", "rotary"),
    [
        ({"rope.scaling.type": "none"}, [], {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, [], {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, [], {"rope_type": "linear", "factor": 2.0}),
        ({"rope.dimension_count": 8}, [], {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ({}, ["rope_freqs.weight"], {"rope_type": "llama3", "factors": "rope_freqs.weight"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            [],
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 128},
            ["rope_factors_long.weight", "rope_factors_short.weight"],
            {"rope_type": "longrope", "attention_factor": 1.25, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rotary_scaling_is_read_from_keys_and_tensors(keys, tensors, rotary, tmp_path):
    found = config_of(tmp_path, keys, tensors=tensors)["rope_parameters"]
    assert {key: found[key] for key in rotary} == rotary
    if rotary["rope_type"] == "yarn":  # as transformers has it when the config names no factor
        assert found["attention_factor"] == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_windows_follow_the_pattern_of_the_architecture_or_of_the_file(tmp_path):
    full, sliding = "full_attention", "sliding_attention"
    keys = {"attention.sliding_window": 512}
    config = config_of(tmp_path, keys, architecture="gemma2")
    assert config["layer_types"] == [sliding, full, sliding]
    config = config_of(
        tmp_path, {**keys, "attention.sliding_window_pattern": [True, True, False]}, architecture="gemma3"
    )
    assert config["layer_types"] == [sliding, sliding, full]
    assert config["rope_parameters"][sliding]["rope_theta"] == 10000.0
    config = config_of(tmp_path, architecture="gemma3")
    assert config["layer_types"] == [full] * LAYERS


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"block_count": 10**9}, "block_count"),
        ({"block_count": 0}, "block_count"),
        ({"block_count": LAYERS + 1}, "no tensor of layer 3"),
        ({"block_count": LAYERS - 1}, "there are tensors of layer 2"),
        ({"expert_count": 8, "expert_used_count": 2}, "no layer has a router"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count": 6}, "does not divide 64"),
        ({"attention.head_count": [4, 4, 2]}, "from layer to layer"),
        ({"attention.head_count_kv": 3}, "does not divide 4 heads"),
        ({"attention.value_length": 8}, "value_length"),
        ({"embedding_length": 128}, "embedding_length"),
        ({"context_length": 2**31}, "context_length"),
        ({"rope.dimension_count": 100}, "dimension_count"),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "rope.scaling.type"),
        ({"rope.freq_base": float("nan")}, "freq_base"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "epsilon"),
        ({"attention.causal": False}, "causal"),
        ({"attention.sliding_window_pattern": [True], "attention.sliding_window": 8}, "sliding_window_pattern"),
        ({"logit_scale": 0.25}, "logit_scale"),
        ({"some.new_way": "sideways"}, "some.new_way"),
        ({"use_parallel_residual": True}, "use_parallel_residual"),
        ({"attention.clamp_kqv": 8.0}, "clamp_kqv"),
        ({"deepstack_mapping": [1, 2, 3]}, "deepstack_mapping"),
    ],
)
def test_what_is_wrong_or_would_change_the_text_is_refused_by_file_and_key(keys, named, tmp_path):
    architecture = "gemma3" if "attention.sliding_window_pattern" in keys else "llama"
    with pytest.raises(UnsupportedModel) as refusal:
        config_of(tmp_path, keys, architecture=architecture)
    assert named in refusal.value.message
    assert str(tmp_path / "model.gguf") in refusal.value.message
    assert refusal.value.cure


@pytest.mark.parametrize("missing", ["block_count", "context_length", "embedding_length", "attention.head_count"])
def test_a_key_that_is_missing_is_named(missing, tmp_path):
    with pytest.raises(UnsupportedModel, match=f"llama.{missing} is missing"):
        config_of(tmp_path, without=[missing])


def test_unknown_keys_with_neutral_values_and_hints_are_let_through(tmp_path):
    neutral = {
        "some.new_scale": 1.0,
        "some.new_count": 0,
        "some.new_flag": False,
        "some.new_name": "",
        "vocab_size": 7,
        "tensor_data_layout": "Meta AI original pth",
    }
    assert config_of(tmp_path, neutral) == config_of(tmp_path)


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path):
    with pytest.raises(UnsupportedModel, match="'mamba'") as refusal:
        config_of(tmp_path, architecture="mamba")
    assert all(name in refusal.value.cure for name in ARCHITECTURES)
