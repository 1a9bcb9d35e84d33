"""The dtype of hidden states on a hop, for made-up machines and links."""

import pytest

from noodle.cluster.plan import MachineReport
from noodle.errors import PlanDoesNotFit
from services.planner.hop_format import HOP_SHARE, Hop, choose_hops, link_bytes_per_second
from tests.unit.planner.test_partition import a_machine, a_shape, cut

HIDDEN_SIZE = 1000
FAST, SLOW = 1e9, 1e6
PREFILL_SECONDS = 0.001


def machine(stage_id: int, link: float = 0.0, **changes: object) -> MachineReport:
    return a_machine(stage_id, link_bytes_per_second=link, **changes)


def hop_of(
    wanted: str, sender: MachineReport, receiver: MachineReport, prefill_seconds: float = PREFILL_SECONDS
) -> Hop:
    machines = [sender, receiver]
    (hop,) = choose_hops(wanted, machines, hidden_size=HIDDEN_SIZE, slowest_prefill_seconds=prefill_seconds)
    return hop


def formats(wanted: str, *, link: float, dtype: str = "float32") -> tuple[str, str]:
    hop = hop_of(wanted, machine(0, dtype=dtype), machine(1, link))
    return hop.dtype, hop.prefill_dtype


def test_a_fast_link_one_machine_and_an_unmeasured_link_carry_what_was_computed() -> None:
    for link in (FAST, 0.0):
        assert formats("auto", link=link) == ("float32", "")
        assert formats("auto", link=link, dtype="bfloat16") == ("bfloat16", "")
    here = hop_of("auto", machine(0, SLOW, machine="m"), machine(1, SLOW, machine="m"), 1e-9)
    assert (here.dtype, here.token_seconds) == ("float32", 0.0)


def test_a_slow_link_carries_16_bits_and_takes_the_seconds_of_these() -> None:
    hop = hop_of("auto", machine(0, FAST), machine(1, SLOW))
    assert hop.dtype == "float16"
    assert hop.token_seconds == pytest.approx(2 * HIDDEN_SIZE / SLOW)


def test_the_share_of_a_prompts_time_decides() -> None:
    just_enough = 4 * HIDDEN_SIZE / (HOP_SHARE * PREFILL_SECONDS)
    assert formats("auto", link=just_enough * 1.01) == ("float32", "")
    assert formats("auto", link=just_enough * 0.99) == ("float16", "")


def test_float32_stays_float32_over_any_link() -> None:
    assert formats("float32", link=SLOW) == ("float32", "")


def test_the_requested_dtype_is_used_and_int8_is_for_prompts_alone() -> None:
    assert formats("bfloat16", link=FAST) == ("bfloat16", "")
    assert formats("int8", link=FAST) == ("float16", "int8")


def test_the_slower_of_two_links_counts() -> None:
    assert link_bytes_per_second(machine(0, FAST), machine(1, SLOW)) == SLOW
    assert link_bytes_per_second(machine(0, 0.0), machine(1, SLOW)) == SLOW


def test_there_is_one_hop_less_than_stages_and_the_last_stage_sends_nothing() -> None:
    assert choose_hops("auto", [machine(0)], hidden_size=HIDDEN_SIZE, slowest_prefill_seconds=PREFILL_SECONDS) == []
    plan = cut(a_shape(hidden_size=HIDDEN_SIZE), [machine(0, FAST), machine(1, SLOW)])
    assert [stage.activation_dtype for stage in plan.stages] == ["float16", ""]
    assert "predicted" in plan.reason


def test_bytes_on_a_slow_link_are_part_of_the_prediction() -> None:
    shape = a_shape(hidden_size=HIDDEN_SIZE)
    fast, slow = (cut(shape, [machine(0, FAST), machine(1, link)]) for link in (FAST, SLOW))
    assert slow.stages[0].hop_token_seconds > 100 * fast.stages[0].hop_token_seconds
    assert slow.reason != fast.reason


def test_weights_and_kv_rows_count_in_the_format_they_are_kept_in() -> None:
    shape = a_shape(kv_items_per_token_per_layer=8)
    plain, packed = (
        cut(shape, [machine(0, **changes)])
        for changes in ({}, {"executor": "ggml", "weights": "q8_0", "kv_dtype": "f16"})
    )
    assert packed.stages[0].weight_bytes == pytest.approx(plain.stages[0].weight_bytes * 34 / 32 / 4, abs=1)
    assert (packed.stages[0].executor, packed.stages[0].kv_dtype) == ("ggml", "f16")
    # a layer of 100 stored bytes, held in 20: measured bytes take precedence over the name
    stored = {"executor": "ggml", "weights": "stored", "kv_dtype": "f16"}
    measured = cut(shape, [machine(0, layer_weight_bytes=20.0, **stored)])
    assert measured.stages[0].weight_bytes == pytest.approx(plain.stages[0].weight_bytes / 5, abs=1)
    assert cut(shape, [machine(0, **stored)]).stages[0].weight_bytes == plain.stages[0].weight_bytes  # as in the file
    with pytest.raises(PlanDoesNotFit, match="q3_X"):
        cut(shape, [machine(0, executor="ggml", weights="q3_X", kv_dtype="f16")])
