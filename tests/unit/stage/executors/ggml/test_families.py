"""What ggml computes of a family is what transformers computes: any cut, any batch, every switch of a config."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from noodle.errors import UnsupportedModel
from services.stage.executors.ggml import loading
from services.stage.executors.ggml.families import GGML_FAMILIES, ggml_lacks
from tests.support.models.tiny_model import make_tiny_model
from tests.support.sampling import sampled
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)
from tests.unit.stage.executors.transformers.test_families import (
    ORIGINAL_LENGTH,
    ROTARY_LENGTHS,
    ROTARY_STEPS,
    rotary_overrides,
)

BOUND = 1e-4  # of the largest logit
LENGTHS = (23, 9, 14)

LATENT_ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 8,
}
# config switches that change what is computed, beside those that every tiny model has
SWITCHES = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "gelu"}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    ("smollm3", {"no_rope_layers": [0, 1, 0, 1, 1, 0], "tie_word_embeddings": False}),
    (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20}),
    ("gemma3_text", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    ("starcoder2", {"sliding_window": None, "use_bias": False}),
    ("gpt2", {"scale_attn_weights": False, "n_inner": 80}),
    ("cohere", {"use_qk_norm": True, "logit_scale": 0.3, "tie_word_embeddings": False}),
    ("cohere", {"attention_bias": True}),
    ("cohere2", {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 3}),
    ("glm4", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt_neox", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "rope_type": "default"}}),
    ("phi", {"qk_layernorm": True, "num_key_value_heads": 1}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("stablelm", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    ("deepseek_v2", {"first_k_dense_replace": 1, "q_lora_rank": None, "routed_scaling_factor": 3.0}),
    ("deepseek_v2", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
    ("deepseek_v2", {"rope_parameters": LATENT_ROTARY, "max_position_embeddings": 256}),
    ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "rope_parameters": LATENT_ROTARY}),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "attention_bias": True}),
    ("minicpm3", {"q_lora_rank": None, "kv_lora_rank": 32, "v_head_dim": 24, "qk_nope_head_dim": 20}),
    ("minicpm3", {"attention_bias": True, "dim_model_base": 32, "scale_depth": 2.0, "tie_word_embeddings": False}),
    ("mixtral", {"num_experts_per_tok": 3, "sliding_window": 5}),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    ("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    ("glm4_moe", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5, "norm_topk_prob": False}),
    ("granitemoeshared", {"shared_intermediate_size": 48, "residual_multiplier": 0.4, "logits_scaling": 6.0}),
    ("ernie4_5_moe", {"moe_layer_start_index": 3, "use_bias": True}),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    ("exaone4", {"sliding_window_pattern": 2}),
    ("hunyuan_v1_moe", {"attention_bias": True, "num_experts": 6, "moe_topk": 3}),
    ("phimoe", {"lm_head_bias": True, "attention_bias": True, "sliding_window": 5, "router_jitter_noise": 0.2}),
    ("nemotron", {"mlp_bias": True, "attention_bias": True}),
    ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    ("gemma", {"num_key_value_heads": 1}),
    ("qwen3_moe", {"mlp_only_layers": [1, 4], "num_experts_per_tok": 1}),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, params=["own kernels", "ggml's kernels"])
def kernels(request, monkeypatch):
    if request.param == "ggml's kernels":
        monkeypatch.setattr(loading, "packed_weights", lambda _: None)


def with_random_vectors(folder: Path) -> Path:
    """Norms and biases that differ from one another, so that none can stand for another."""
    random = np.random.default_rng(3)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if value.ndim == 1:
            tensors[key] = (value + random.normal(0, 0.2, value.shape)).astype(np.float32)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.family
@sampled("cuts", ((0, 6), (0, 4, 6), (0, 1, 3, 6)), {(0, 1, 3, 6)})
@pytest.mark.parametrize(("model_type", "switches"), [*((model_type, {}) for model_type in GGML_FAMILIES), *SWITCHES])
def test_one_two_and_three_slices_give_the_logits_of_transformers(model_type, switches, cuts, tmp_path):
    need_ggml()
    folder = with_random_vectors(make_tiny_model(tmp_path, model_type, **switches))
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(folder, cuts, executor="ggml").run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.family
@pytest.mark.parametrize(
    ("model_type", "scaling"),
    [(model_type, scaling) for model_type in ("llama", "qwen3") for scaling in ("linear", "llama3", "yarn")],
)
def test_rotary_scaling_is_that_of_transformers_beyond_the_original_length(model_type, scaling, tmp_path):
    need_ggml()
    folder = make_tiny_model(tmp_path, model_type, **rotary_overrides(model_type, scaling))
    sessions = random_sessions(ROTARY_LENGTHS)
    pipeline = SlicePipeline(folder, (0, 2, 6), executor="ggml", context_length=4 * ORIGINAL_LENGTH)
    assert relative_difference(pipeline.run(sessions, ROTARY_STEPS), unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.family
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_longrope_is_fixed_by_the_promised_context(model_type, tmp_path):
    folder = make_tiny_model(tmp_path, model_type, **rotary_overrides(model_type, "longrope"))
    sessions = random_sessions(ROTARY_LENGTHS)
    for context_length in (ORIGINAL_LENGTH, 4 * ORIGINAL_LENGTH):
        got, expected = (
            SlicePipeline(folder, (0, 2, 6), executor=executor, context_length=context_length).run(
                sessions, ROTARY_STEPS
            )
            for executor in ("ggml", "transformers")
        )
        assert relative_difference(got, expected) < BOUND


@pytest.mark.parametrize("kinds", [("ggml", "transformers"), ("transformers", "ggml")])
def test_slices_of_both_executors_make_one_pipeline(kinds, tmp_path):
    folder = make_tiny_model(tmp_path, "gemma2")
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(folder, (0, 3, 6), executor=kinds).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "biogpt"}, "biogpt"),
        ({"model_type": "llama", "hidden_act": "mish"}, "mish"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "by layer"),
    ],
)
def test_what_ggml_lacks_is_said_of_the_config(config, named):
    assert named in ggml_lacks(config)
    assert ggml_lacks({"model_type": "llama", "hidden_act": "silu"}) == ""


def test_a_model_that_ggml_lacks_is_refused_with_the_way_out(tmp_path):
    need_ggml()
    folder = make_tiny_model(tmp_path, "biogpt")
    with pytest.raises(UnsupportedModel, match="biogpt") as refusal:
        load_by_ggml(folder, 0, 6, weights="f32", context_length=256, threads=1)
    assert "transformers" in refusal.value.cure
    assert json.loads((folder / "config.json").read_text())["model_type"] == "biogpt"
