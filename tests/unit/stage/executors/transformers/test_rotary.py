"""Longrope's factors are chosen once, by the promised context, and no step changes them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.stage.executors.transformers.rotary import fix_rotary
from tests.support.models.tiny_model import tiny_config

LONG, SHORT = [4.0] * 8, [1.0] * 8
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}


def frequencies(module, position, **options):
    """cos and sin of a position in a step of its own."""
    return module(torch.zeros(1, 1, 64), torch.tensor([[position]]), **options)


@pytest.mark.parametrize("context_length", [32, 33, 128])
def test_a_short_and_a_long_step_get_the_same_frequencies(context_length):
    model = AutoModelForCausalLM.from_config(
        tiny_config("llama", max_position_embeddings=128, rope_parameters=LONGROPE)
    )
    rotary = model.model.rotary_emb
    fix_rotary(model, context_length)
    before = rotary.inv_freq.clone()
    first = frequencies(rotary, 5)
    frequencies(rotary, 100)
    again = frequencies(rotary, 5)
    assert torch.equal(rotary.inv_freq, before)
    assert torch.equal(first[0], again[0])
    factor = 4.0 if context_length > 32 else 1.0
    plain = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    assert torch.allclose(before, plain / factor)


def test_the_attention_scaling_is_that_of_the_config_for_every_promise():
    config = tiny_config("llama", max_position_embeddings=128, rope_parameters=LONGROPE)
    scalings = set()
    for context_length in (16, 128):
        model = AutoModelForCausalLM.from_config(config)
        fix_rotary(model, context_length)
        scalings.add(model.model.rotary_emb.attention_scaling)
    assert len(scalings) == 1
    assert scalings.pop() > 1


def test_only_the_layer_types_with_longrope_are_fixed():
    full = {**LONGROPE}
    config = tiny_config(
        "gemma3_text",
        max_position_embeddings=128,
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    rotary = model.model.rotary_emb
    untouched = rotary.sliding_attention_inv_freq.clone()
    fix_rotary(model, 128)
    fixed = rotary.full_attention_inv_freq.clone()
    frequencies(rotary, 5, layer_type="full_attention")
    assert torch.equal(rotary.full_attention_inv_freq, fixed)
    assert torch.equal(rotary.sliding_attention_inv_freq, untouched)


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
def test_the_other_scalings_do_not_change_with_the_positions_of_a_step(scaling):
    parameters = {"rope_type": scaling, "rope_theta": 10000.0}
    if scaling != "default":
        parameters["factor"] = 4.0
    if scaling in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = 32
    if scaling == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = AutoModelForCausalLM.from_config(
        tiny_config("llama", max_position_embeddings=128, rope_parameters=parameters)
    )
    fix_rotary(model, 128)
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    frequencies(rotary, 500)
    frequencies(rotary, 3)
    assert torch.equal(rotary.inv_freq, before)
