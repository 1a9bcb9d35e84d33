"""Whether a stage has room for the KV rows of one session, checked when it loads its layers."""

import pytest

from noodle.cluster.plan import MINIMUM_SESSION_TOKENS, Plan, StageAssignment
from noodle.config.environment import stage_config
from noodle.errors import PlanDoesNotFit
from services.stage.loading import check_kv_room

STAGES = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{8081 + i}", 3 * i, 3 * i + 3, "float32") for i in range(2))
BYTES_PER_TOKEN = 768


def check(kv_bytes, context_length=256, **variables):
    plan = Plan(1, "digest", 6, 64, 300, context_length, STAGES)
    config = stage_config({"NOODLE_CLUSTER_TOKEN": "x" * 20, **variables})
    check_kv_room(config, plan, 1, kv_bytes, BYTES_PER_TOKEN)


def test_room_for_the_shortest_session_is_enough():
    check(MINIMUM_SESSION_TOKENS * BYTES_PER_TOKEN)
    check(4 * BYTES_PER_TOKEN, context_length=4)  # a model with a shorter context


def test_less_is_refused_with_the_stage_the_numbers_and_the_cure():
    with pytest.raises(PlanDoesNotFit) as caught:
        check(1, NOODLE_KV_BYTES="1")
    for word in ("Stage 1 on vm", "0 tokens", "NOODLE_KV_BYTES=1", "768 bytes a token", "has 16"):
        assert word in caught.value.message
    assert str(MINIMUM_SESSION_TOKENS * BYTES_PER_TOKEN) in caught.value.cure


def test_a_machine_without_free_memory_gets_another_cure():
    with pytest.raises(PlanDoesNotFit, match="its share of what is free") as caught:
        check(MINIMUM_SESSION_TOKENS * BYTES_PER_TOKEN - 1)
    assert "NOODLE_SPLIT" in caught.value.cure
