"""GGUF files that llama.cpp's converter writes of every family, against transformers."""

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from tests.support.converter.gguf_models import GGUF_FAMILIES, VOCAB_SIZE, convert_model, make_gguf_model
from tests.support.converter.quantized import quantized_gguf, rounded_folder
from tests.support.sampling import sampled
from tests.support.stages.executors import need_ggml
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)
from tests.unit.stage.executors.transformers.test_families import ORIGINAL_LENGTH, ROTARY, ROTARY_LENGTHS, ROTARY_STEPS


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_rounded_folder_holds_the_values_of_the_quantised_file(kind, tmp_path):
    folder = make_gguf_model(tmp_path / "model", "mixtral")
    quantised = quantized_gguf(convert_model(folder, tmp_path / "f32.gguf"), tmp_path / "quantised.gguf", kind)
    rounded = convert_model(rounded_folder(folder, tmp_path / "rounded", kind), tmp_path / "rounded.gguf")
    expected = {tensor.name: tensor.data for tensor in GGUFReader(rounded).tensors}
    tensors = GGUFReader(quantised).tensors
    assert len(tensors) == len(expected)
    assert kind in {tensor.tensor_type.name for tensor in tensors}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(-1), expected[tensor.name].reshape(-1)), tensor.name


BOUND = 1e-4  # of the largest logit
STORED_BOUND = 1e-3  # with ggml's table for GELU, which is float16
QUANTISED_BOUND = 0.15
QUANTISED = [(model_type, kind) for model_type in GGUF_FAMILIES for kind in ("Q8_0", "Q4_K")]
SAMPLED_FAMILIES = {"cohere2", "deepseek_v3", "gemma3_text", "glm4_moe", "gpt_oss", "llama", "phimoe", "qwen3_moe"}
SAMPLE = [("qwen3_moe", "Q4_K"), ("llama", "Q8_0"), ("glm4_moe", "Q4_K")]
LENGTHS = (23, 9, 14)
CUTS = (0, 2, 3, 6)
LONG = {"max_position_embeddings": 4 * ORIGINAL_LENGTH}
LONG_ROTARY = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * number for number in range(32)],
    "long_factor": [1.0 + 0.2 * number for number in range(32)],
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "factor": 4.0,
}
HUNYUAN_ROTARY = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
# config switches that a file's header says otherwise than config.json
SWITCHES = [
    ("llama", {**LONG, "rope_parameters": ROTARY["llama3"]}),
    ("glm4_moe", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    ("llama", {**LONG, "rope_parameters": ROTARY["linear"]}),
    ("llama", {**LONG, "rope_parameters": ROTARY["yarn"]}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    ("qwen3_moe", {**LONG, "rope_parameters": ROTARY["yarn"]}),
    ("qwen3_moe", {"norm_topk_prob": True, "num_local_experts": 9, "num_experts_per_tok": 5}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    ("exaone4", {**LONG, "rope_parameters": ROTARY["llama3"]}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 3}),
    ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 6.0}),
    ("hunyuan_v1_dense", {"max_position_embeddings": 32768, "rope_parameters": HUNYUAN_ROTARY}),
    ("nemotron", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1], "tie_word_embeddings": False}),
    ("phi3", {**LONG, "original_max_position_embeddings": ORIGINAL_LENGTH, "rope_parameters": LONG_ROTARY}),
    ("seed_oss", {"attention_bias": False}),
]


def typical_difference(got, expected):
    """The median over tokens: where two experts are nearly equal, rounding may choose another one for a token."""
    each = [np.abs(g - e).max(axis=1) / np.abs(e).max() for g, e in zip(got, expected, strict=True)]
    return float(np.median(np.concatenate(each)))


@pytest.mark.family
@sampled("model_type", GGUF_FAMILIES, SAMPLED_FAMILIES)
def test_a_file_of_float32_gives_the_logits_of_transformers(model_type, tmp_path):
    folder = make_gguf_model(tmp_path / "model", model_type)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    expected = unsplit_logits(folder, sessions)
    for weights, bound in (("f32", BOUND), ("stored", STORED_BOUND)):
        got = SlicePipeline(path, CUTS, executor="ggml", weights=weights).run(sessions, STEPS)
        assert relative_difference(got, expected) < bound, weights


@pytest.mark.family
@sampled(("model_type", "switches"), SWITCHES, SWITCHES[:2])
def test_what_differs_within_a_family_is_read_from_the_header(model_type, switches, tmp_path):
    folder = make_gguf_model(tmp_path / "model", model_type, **switches)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions(ROTARY_LENGTHS, VOCAB_SIZE)
    compared = 1 if switches.get("rope_parameters", {}).get("rope_type") == "longrope" else len(sessions)
    pipeline = SlicePipeline(path, CUTS, executor="ggml", weights="f32", context_length=4 * ORIGINAL_LENGTH)
    got = pipeline.run(sessions, ROTARY_STEPS)[:compared]  # noodle's factors follow from the promised length alone
    assert relative_difference(got, unsplit_logits(folder, sessions[:compared])) < BOUND


@pytest.mark.family
@sampled(("model_type", "kind"), QUANTISED, SAMPLE)
def test_quantised_files_give_the_logits_of_transformers_with_the_values_of_their_blocks(model_type, kind, tmp_path):
    folder = make_gguf_model(tmp_path / "model", model_type)
    plain = convert_model(folder, tmp_path / "f32.gguf")
    path = quantized_gguf(plain, tmp_path / "quantised.gguf", kind)
    rounded = rounded_folder(folder, tmp_path / "rounded", kind)
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    expected = unsplit_logits(rounded, sessions)
    got = SlicePipeline(path, CUTS, executor="ggml", weights="f32").run(sessions, STEPS)
    assert relative_difference(got, expected) < BOUND
    # activations are rounded to 8 bits before they meet quantised weights
    got = SlicePipeline(path, CUTS, executor="ggml", weights="stored").run(sessions, STEPS)
    assert typical_difference(got, expected) < QUANTISED_BOUND


ORIGINAL_LENGTH = 32
FACTORS = {name: [1.0 + step * pair for pair in range(32)] for name, step in (("short", 0.01), ("long", 0.1))}
ROTARY = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": FACTORS["short"], "long_factor": FACTORS["long"]},
}
GEMMA_ROTARY = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}


@pytest.mark.family
@pytest.mark.parametrize(
    ("model_type", "scaling"),
    [("llama", "linear"), ("llama", "llama3"), ("llama", "yarn"), ("qwen3", "yarn"), ("phi3", "longrope")],
)
def test_rotary_scaling_in_a_file_is_that_of_the_folder_it_was_made_of(model_type, scaling, tmp_path):
    parameters = {"rope_type": scaling, "rope_theta": 1e4, **ROTARY[scaling]}
    if scaling != "linear":
        parameters["original_max_position_embeddings"] = ORIGINAL_LENGTH
    overrides = {"max_position_embeddings": 4 * ORIGINAL_LENGTH, "rope_parameters": parameters}
    if model_type == "phi3":
        overrides |= {"original_max_position_embeddings": ORIGINAL_LENGTH, "sliding_window": None}
    folder = make_gguf_model(tmp_path / "model", model_type, **overrides)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions((60, 9, 14), VOCAB_SIZE)
    for context_length in (ORIGINAL_LENGTH, 4 * ORIGINAL_LENGTH):
        got, expected = (
            SlicePipeline(model, CUTS, executor=executor, context_length=context_length).run(sessions, STEPS)
            for model, executor in ((path, "ggml"), (folder, "transformers"))
        )
        assert relative_difference(got, expected) < BOUND


@pytest.mark.family
def test_layers_with_a_window_have_their_own_rotary_base(tmp_path):
    folder = make_gguf_model(tmp_path / "model", "gemma3_text", rope_parameters=GEMMA_ROTARY)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    got = SlicePipeline(path, CUTS, executor="ggml").run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND
