"""The cost of a layer by a made-up machine and made-up headers; the expected seconds are summed by hand."""

from pathlib import Path

import pytest

from noodle.model.configs.completed import completed_config
from noodle.model.quantization import held_tensors
from noodle.model.tensor_entry import TensorEntry
from services.stage.selection.layer_costs import (
    CONTEXT_TOKENS,
    HIDDEN_PASSES,
    LAYER_OPERATIONS,
    MachineSpeed,
    layer_seconds,
    model_weights,
)

CONFIG = {"vocab_size": 1000, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
PRODUCTS = {"Q4_K": (1.0, 2.0, 30.0), "Q6_K": (10.0, 20.0, 300.0), "F32": (3.0, 4.0, 50.0), "Q8_0": (0.5, 0.6, 7.0)}
NOTHING_ELSE = dict.fromkeys(
    ("operation_seconds", "item_seconds", "key_seconds", "chunk_key_seconds", "sample_seconds"), 0.0
)
BYTES = {"Q4_K": 144 / 256, "Q6_K": 210 / 256, "F32": 4.0, "Q8_0": 34 / 32, "BF16": 2.0}


def entry(dtype, *shape):
    count = 1
    for size in shape:
        count *= size
    return TensorEntry(Path("m.gguf"), dtype, shape, 0, int(count * BYTES.get(dtype, 1)))


def speed(**changes):
    return MachineSpeed(threads=1, product_seconds=PRODUCTS, **{**NOTHING_ELSE, **changes})


def two_layers(**others):
    return {
        "token_embd.weight": entry("Q6_K", 1000, 256),
        "blk.0.attn_q.weight": entry("Q4_K", 256, 256),
        "blk.0.attn_norm.weight": entry("F32", 256),
        "blk.1.attn_q.weight": entry("Q6_K", 256, 256),
        "blk.1.attn_norm.weight": entry("F32", 256),
        **others,
    }


def test_a_mean_layer_is_the_sum_of_its_matrices_by_type_and_rows():
    weights = model_weights(CONFIG, two_layers(), 2)
    items = 256 * 256
    a, b = items * BYTES["Q4_K"] / 2, items * BYTES["Q6_K"] / 2
    found = layer_seconds(weights, speed())
    assert found.decode_layer_seconds == pytest.approx(a * 1 + b * 10)
    assert found.batched_layer_seconds == pytest.approx((a * 2 + b * 20) / 4)
    assert found.prefill_layer_seconds_per_token == pytest.approx((a * 30 + b * 300) / 128)
    assert found.layer_weight_bytes == pytest.approx(a + b)
    assert found.source == "measured"


def test_a_tied_head_is_the_embedding_and_one_of_its_own_is_not():
    tied = layer_seconds(model_weights(CONFIG, two_layers(), 2), speed())
    assert tied.head_decode_seconds == pytest.approx(1000 * 256 * BYTES["Q6_K"] * 10)
    entries = two_layers(**{"output.weight": entry("Q8_0", 1000, 256)})
    own = layer_seconds(model_weights(CONFIG, entries, 2), speed())
    assert own.head_decode_seconds == pytest.approx(1000 * 256 * BYTES["Q8_0"] * 0.5)
    assert own.batched_head_seconds == pytest.approx(1000 * 256 * BYTES["Q8_0"] * 0.6 / 4)


def test_sampling_attention_and_small_operations_are_added():
    weights = model_weights(CONFIG, two_layers(), 2)
    plain = layer_seconds(weights, speed())
    others = {"sample_seconds": 1e-3, "operation_seconds": 2.0, "item_seconds": 0.5, "key_seconds": 0.25}
    found = layer_seconds(weights, speed(**others))
    assert found.head_decode_seconds - plain.head_decode_seconds == pytest.approx(1.0)
    added = LAYER_OPERATIONS * 2.0 + HIDDEN_PASSES * 256 * 0.5 + CONTEXT_TOKENS * 256 * 0.25
    assert found.decode_layer_seconds - plain.decode_layer_seconds == pytest.approx(added)


@pytest.mark.parametrize("name", ["blk.{}.ffn_up_exps.weight", "model.layers.{}.mlp.experts.0.up_proj.weight"])
def test_of_experts_only_those_that_a_token_chooses_are_read(name):
    config = {**CONFIG, "num_local_experts": 8, "num_experts_per_tok": 2}
    entries = two_layers(**{name.format(number): entry("Q4_K", 8, 256, 256) for number in (0, 1)})
    found = layer_seconds(model_weights(config, entries, 2), speed())
    dense = layer_seconds(model_weights(config, two_layers(), 2), speed())
    experts = 8 * 256 * 256 * BYTES["Q4_K"]
    assert found.decode_layer_seconds - dense.decode_layer_seconds == pytest.approx(experts * 2 / 8)
    # 128 tokens use all experts, each by 32 rows: between the costs of 4 and of 128
    chunk = found.prefill_layer_seconds_per_token - dense.prefill_layer_seconds_per_token
    assert chunk == pytest.approx(experts * (2.0 + 28.0 * 28 / 124) / 128)
    assert found.layer_weight_bytes - dense.layer_weight_bytes == pytest.approx(experts)


@pytest.mark.parametrize(
    ("model_type", "spelled"),
    [
        ("ernie4_5_moe", {"moe_num_experts": 64, "moe_k": 8}),
        ("hunyuan_v1_moe", {"num_experts": 64, "moe_topk": 8}),
        ("qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 8}),
    ],
)
def test_the_share_of_experts_is_known_however_a_family_spells_it(model_type, spelled):
    config = completed_config({**CONFIG, "model_type": model_type, "num_hidden_layers": 2, **spelled})
    assert model_weights(config, two_layers(), 2).expert_share == 8 / 64


def test_another_format_is_counted_by_its_own_bytes_and_speed():
    weights = model_weights(CONFIG, two_layers(), 2).in_format("q8_0")
    assert weights.types == ("Q8_0",)
    assert layer_seconds(weights, speed()).decode_layer_seconds == pytest.approx(256 * 256 * BYTES["Q8_0"] * 0.5)


def test_a_format_whose_blocks_do_not_fit_the_models_rows_is_not_compared():
    assert model_weights(CONFIG, two_layers(), 2).fits("q4_K")
    assert not model_weights({**CONFIG, "hidden_size": 576}, two_layers(), 2).fits("q4_K")


def test_layers_that_only_training_used_and_positions_are_left_out():
    plain = model_weights(CONFIG, two_layers(), 2)
    extra = {"blk.2.attn_q.weight": entry("Q4_K", 256, 256), "position_embd.weight": entry("F32", 512, 256)}
    assert model_weights(CONFIG, two_layers(**extra), 2) == plain


def test_a_quantised_checkpoint_counts_in_the_types_that_ggml_holds():
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    parts = {"qweight": entry("I32", 32, 256), "qzeros": entry("I32", 8, 32), "scales": entry("F16", 8, 256)}
    entries = two_layers(**{f"model.layers.0.mlp.up_proj.{name}": part for name, part in parts.items()})
    found = model_weights(CONFIG, held_tensors(config, entries), 2)
    plain = model_weights(CONFIG, two_layers(), 2)
    assert found.layer_bytes == {**plain.layer_bytes, "Q4_0": 256 * 256 * 18 / 32 / 2}


def test_a_speed_with_something_that_takes_no_time_is_not_believed():
    assert not speed().is_plausible
    assert speed(**dict.fromkeys(NOTHING_ELSE, 1e-9)).is_plausible
