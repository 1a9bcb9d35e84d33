"""Split equals whole, for every family: real slices from a real folder against the unsplit model of transformers."""

import pytest
import torch

from noodle.errors import UnsupportedModel
from noodle.model.families import FAMILIES, check_supported
from tests.support.models.tiny_model import make_tiny_model
from tests.support.sampling import sampled
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

BOUND = 1e-4  # of the largest logit
LENGTHS = (23, 9, 14)  # all but one longer than the tiny models' sliding window of 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.family
@sampled("cuts", ((0, 4, 6), (0, 1, 3, 6)), {(0, 1, 3, 6)})
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_two_and_three_slices_give_the_logits_of_the_unsplit_model(model_type, cuts, tmp_path):
    folder = make_tiny_model(tmp_path, model_type)
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(folder, cuts).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.parametrize("model_type", ["granite", "granitemoe", "granitemoeshared"])
def test_embeddings_are_scaled_on_the_first_slice_alone(model_type, tmp_path):
    folder = make_tiny_model(tmp_path, model_type, embedding_multiplier=3.0, logits_scaling=6.0)
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(folder, (0, 2, 6)).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


ORIGINAL_LENGTH = 32
LONG_FACTORS = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]  # one for each pair of the head's 16 dimensions
SHORT_FACTORS = [1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3]
ROTARY = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": SHORT_FACTORS,
        "long_factor": LONG_FACTORS,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
        "factor": 4.0,
    },
}
ROTARY_LENGTHS = (60, 9, 14)  # the first goes beyond the original length
ROTARY_STEPS = [[(0, 20), (1, 5)], [(0, 25), (1, 4), (2, 3)], [(0, 14), (2, 10)], [(0, 1), (2, 1)]]
LLAMA_LIKE = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def rotary_overrides(model_type, scaling):
    overrides = {"max_position_embeddings": 4 * ORIGINAL_LENGTH, "rope_parameters": dict(ROTARY[scaling])}
    if model_type == "phi3":
        overrides["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if model_type == "mistral":
        overrides["sliding_window"] = None
    return overrides


SCALED = [
    (model_type, scaling)
    for model_type in LLAMA_LIKE
    for scaling in ("default", "linear", "llama3", "yarn")
    if model_type != "phi3" or scaling == "default"  # its config takes default and longrope alone
]


@pytest.mark.family
@sampled(("model_type", "scaling"), SCALED, {pair for pair in SCALED if "llama" in pair or "yarn" in pair})
def test_rotary_scaling_is_the_same_in_slices_also_beyond_the_original_length(model_type, scaling, tmp_path):
    folder = make_tiny_model(tmp_path, model_type, **rotary_overrides(model_type, scaling))
    sessions = random_sessions(ROTARY_LENGTHS)
    got = SlicePipeline(folder, (0, 2, 5, 6), context_length=4 * ORIGINAL_LENGTH).run(sessions, ROTARY_STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.family
@sampled("model_type", LLAMA_LIKE, {"llama", "phi3"})
def test_longrope_is_fixed_by_the_promised_context_and_not_by_who_shares_a_step(model_type, tmp_path):
    folder = make_tiny_model(tmp_path / "model", model_type, **rotary_overrides(model_type, "longrope"))
    sessions = random_sessions(ROTARY_LENGTHS)
    long_promise = SlicePipeline(folder, (0, 2, 5, 6), context_length=4 * ORIGINAL_LENGTH)
    got = long_promise.run(sessions, ROTARY_STEPS)
    # the long session as transformers has it; the short ones as a model has them that knows the long factors alone
    assert relative_difference(got[:1], unsplit_logits(folder, sessions[:1])) < BOUND
    overrides = rotary_overrides(model_type, "longrope")
    overrides["rope_parameters"]["short_factor"] = LONG_FACTORS
    long_only = make_tiny_model(tmp_path / "long only", model_type, **overrides)
    assert relative_difference(got, unsplit_logits(long_only, sessions)) < BOUND

    short_promise = SlicePipeline(folder, (0, 2, 5, 6), context_length=ORIGINAL_LENGTH)
    short = short_promise.run(sessions[1:], [[(0, 5)], [(0, 4), (1, 13)], [(1, 1)]])
    assert relative_difference(short, unsplit_logits(folder, sessions[1:])) < BOUND


@pytest.mark.family
def test_gpt2_in_its_true_shape_split_10_and_2(tmp_path):
    folder = make_tiny_model(
        tmp_path, "gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024, n_inner=None
    )
    sessions = random_sessions(LENGTHS, vocab_size=50257)
    pipeline = SlicePipeline(folder, (0, 10, 12), context_length=1024)
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(folder, sessions)) < BOUND


def test_a_type_that_is_not_on_the_list_is_refused_by_name():
    with pytest.raises(UnsupportedModel) as refusal:
        check_supported({"model_type": "mamba"})
    assert "mamba" in str(refusal.value)
    assert "smollm3" in refusal.value.cure
    with pytest.raises(UnsupportedModel):
        check_supported({})


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
    ],
)
def test_dynamic_rotary_scaling_is_refused_by_name(config):
    with pytest.raises(UnsupportedModel) as refusal:
        check_supported({"model_type": "llama", **config})
    assert "dynamic" in str(refusal.value)


@pytest.mark.parametrize("scaling", sorted(ROTARY))
def test_the_other_rotary_scalings_pass(scaling):
    check_supported({"model_type": "llama", "rope_parameters": ROTARY[scaling]})
    check_supported({"model_type": "gemma3_text", "rope_parameters": {"full_attention": ROTARY[scaling]}})


def test_an_unknown_rotary_scaling_and_quantized_weights_are_refused():
    with pytest.raises(UnsupportedModel) as refusal:
        check_supported({"model_type": "llama", "rope_scaling": {"rope_type": "spiral"}})
    assert "spiral" in str(refusal.value)
    with pytest.raises(UnsupportedModel) as refusal:
        check_supported({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    assert "gptq" in str(refusal.value)
