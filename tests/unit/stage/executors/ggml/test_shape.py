"""A model's shape read from config.json alone, compared with what transformers' config class makes of it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from noodle.errors import UnsupportedModel
from noodle.model.configs.defaults import DEFAULTS
from services.stage.executors.ggml.families import ACTIVATIONS, GGML_FAMILIES
from services.stage.executors.ggml.shape import EPSILON_NAMES, shape_of
from tests.support.models.tiny_gguf import TinyLlama, write_tiny_gguf
from tests.support.models.tiny_model import tiny_config
from tests.support.stages.executors import need_ggml

EXPERT_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
SIZES = {"num_hidden_layers": 7, "num_attention_heads": 8, "hidden_size": 128, "num_key_value_heads": 2}
# what configs on the hub say and leave out
SPELLINGS = [
    ("llama", {"rope_theta": 5000.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6}),
    ("llama", {"head_dim": 32}),
    ("llama", {"head_dim": None, "num_key_value_heads": None}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 100}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"num_experts": 6, "norm_topk_prob": True}),
    ("gemma2", {"layer_types": ["full_attention"] * 7, "final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window_pattern": 3, "rope_theta": 2e6, "rope_local_base_freq": 7000.0}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.5] * 8},
            "original_max_position_embeddings": 1024,
            "max_position_embeddings": 4096,
        },
    ),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 50}),
    ("gpt2", {"n_embd": 128, "n_head": 4, "n_layer": 5, "n_positions": 77}),
    ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
]


def frequencies_of(config, kind, head_dim):
    """transformers' frequencies and scaling of one type of layer."""
    parameters = config.rope_parameters
    parameters = parameters.get(kind, parameters)
    rotary_type = parameters["rope_type"]
    if rotary_type == "default":
        dimensions = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / parameters["rope_theta"] ** (np.arange(0, dimensions, 2) / dimensions), 1.0
    layer_type = {"layer_type": kind} if kind in config.rope_parameters else {}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rotary_type](config, "cpu", seq_len=100, **layer_type)
    return frequencies.numpy(), scaling


def check(got, config):
    family = got.family
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert got.layer_count == config.num_hidden_layers
    assert (got.hidden_size, got.vocab_size) == (config.hidden_size, config.vocab_size)
    if family.latent:
        assert (got.heads, got.kv_heads, got.value_dim) == (config.num_attention_heads, 1, config.kv_lora_rank)
        assert got.head_dim == config.kv_lora_rank + config.qk_rope_head_dim
        assert (got.latent.plain_dim, got.latent.value_dim) == (config.qk_nope_head_dim, config.v_head_dim)
    else:
        assert (got.heads, got.head_dim) == (config.num_attention_heads, head_dim)
        assert got.kv_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert got.tied == config.tie_word_embeddings
    assert got.maximum_positions == config.max_position_embeddings
    epsilons = [getattr(config, name, None) for name in EPSILON_NAMES]
    assert got.norm_epsilon == next(value for value in epsilons if value is not None)
    names = ("hidden_activation", "hidden_act", "activation_function")
    assert got.activation == ACTIVATIONS[next(getattr(config, name) for name in names if hasattr(config, name))]
    for name, value in (
        (family.embedding_scale, got.input_scale),
        (family.residual_scale, got.residual_scale),
        (family.attention_scale, got.attention_scale),
        (family.logit_divisor, 1 / got.logit_scale),
        (family.logit_factor, got.logit_scale),
        (family.attention_cap, got.attention_cap),
        (family.logit_cap, got.logit_cap),
    ):
        assert not name or value == pytest.approx(getattr(config, name) or 0.0)
    if family.query_scalar:
        assert got.attention_scale == pytest.approx(config.query_pre_attn_scalar**-0.5)
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if layer_types:
        assert got.windows == tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    else:
        assert got.windows == (window,) * config.num_hidden_layers
    if family.experts:
        experts = next(getattr(config, name) for name in EXPERT_COUNTS if hasattr(config, name))
        assert (got.experts, got.experts_per_token) == (experts, config.num_experts_per_tok or 0)
    if family.positions:
        assert set(got.rotaries) == {None}
        return
    has_rotary = getattr(config, "no_rope_layers", None) or [1] * got.layer_count
    if family.rotary_in_windows and window:
        has_rotary = [kind == "sliding_attention" for kind in layer_types]
    assert [rotary is not None for rotary in got.rotaries] == [bool(each) for each in has_rotary]
    for kind, rotary in zip(layer_types or ["full_attention"] * got.layer_count, got.rotaries, strict=True):
        if rotary is not None:
            frequencies, scaling = frequencies_of(config, kind, head_dim)
            np.testing.assert_allclose(rotary.frequencies, frequencies, rtol=1e-5)
            assert rotary.scaling == pytest.approx(scaling)


def test_every_family_has_its_defaults():
    assert set(DEFAULTS) >= set(GGML_FAMILIES)


@pytest.mark.parametrize("model_type", GGML_FAMILIES)
def test_a_config_that_transformers_saved_has_the_shape_that_transformers_computes(model_type, tmp_path):
    config = tiny_config(model_type)
    config.save_pretrained(tmp_path)
    check(shape_of(json.loads((tmp_path / "config.json").read_text()), 100), config)


@pytest.mark.parametrize("model_type", GGML_FAMILIES)
@pytest.mark.parametrize("sizes", [{}, SIZES])
def test_what_a_config_leaves_out_is_what_transformers_fills_in(model_type, sizes):
    check(shape_of({"model_type": model_type, **sizes}, 100), AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize(("model_type", "given"), SPELLINGS)
def test_spellings_of_configs_on_the_hub_mean_what_transformers_reads(model_type, given):
    config = {**({} if model_type == "gpt2" else SIZES), **given}
    check(shape_of({"model_type": model_type, **config}, 100), AutoConfig.for_model(model_type, **config))


@pytest.mark.parametrize(
    "broken",
    [
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"vocab_size": "many"},
        {"hidden_size": -8},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": []}},
        {"sliding_window": "wide"},
    ],
)
def test_a_malformed_value_is_refused_before_anything_is_allocated(broken):
    with pytest.raises(UnsupportedModel, match="llama"):
        shape_of({"model_type": "llama", **SIZES, **broken}, 100)


def test_loading_by_ggml_imports_neither_torch_nor_transformers(tmp_path):
    need_ggml()
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama())
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from services.stage.executors.ggml.loading import load_ggml_slice\n"
        f"load_ggml_slice(Path({str(path)!r}), 0, 3, weights='stored', context_length=64, threads=1)\n"
        "loaded = [name for name in ('torch', 'transformers', 'gguf', 'safetensors') if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
