"""Stages of both executors in one pipeline, and activation dtypes other than the computing dtype (design D13)."""

import importlib.util

import pytest

from tests.support.models.equality import assert_equal_or_tied
from tests.support.models.whole_model import WholeModel
from tests.support.processes.stage_rig import running_coordinator, running_stages
from tests.support.sampling import sampled

needs_ggml = pytest.mark.skipif(importlib.util.find_spec("ggml") is None, reason="ggml is not installed (make ggml)")
NEW_TOKENS = 24
PROMPTS = ("a fixed prompt", "some other words, and a few more of them so that a chunk is longer than a step of decode")
TRANSFORMERS = {"executor": "transformers", "weights": "f32", "kv_dtype": "f32"}
GGML = {"executor": "ggml", "weights": "f32", "kv_dtype": "f32"}
PIPELINES = ((GGML, TRANSFORMERS, GGML), (TRANSFORMERS, GGML, TRANSFORMERS))

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def whole(tiny_folder):
    return WholeModel(tiny_folder)


def answers(tiny_folder, folder, computed):
    """Return prompt and answer tokens of each prompt, and the stages of /health."""
    with (
        running_stages(folder, tiny_folder, (2, 2, 2), computed=computed) as rig,
        running_coordinator(rig, folder) as services,
    ):
        made = [services.generate(each, max_new_tokens=NEW_TOKENS, details=True)["details"] for each in PROMPTS]
        tokens = [(each["prompt_token_ids"], [token["id"] for token in each["tokens"]]) for each in made]
        return tokens, services.get("/health", services.token)[1]["stages"]


@needs_ggml
@sampled("computed", PIPELINES, PIPELINES[:1])
def test_both_executors_in_one_pipeline_say_what_the_unsplit_model_says(computed, tiny_folder, whole, tmp_path):
    tokens, stages = answers(tiny_folder, tmp_path, computed)
    assert [stage["executor"] for stage in stages] == [each["executor"] for each in computed]
    assert {stage["weights"] for stage in stages} == {"f32"}
    tied = [assert_equal_or_tied(whole, prompt, got, NEW_TOKENS) for prompt, got in tokens]
    assert sum(tied) <= 1


@needs_ggml
def test_eight_bits_and_sixteen_on_the_hop_answer_whole(tiny_folder, tmp_path):
    hop = {"activation_dtype": "float16", "prefill_activation_dtype": "int8"}
    small = GGML | {"weights": "q8_0", "kv_dtype": "f16"} | hop
    tokens, stages = answers(tiny_folder, tmp_path, (small, TRANSFORMERS | hop, small))
    assert [stage["hop_dtypes"] for stage in stages] == [["float16", "int8"], ["float16", "int8"], []]
    assert [len(got) for _, got in tokens] == [NEW_TOKENS] * len(PROMPTS)


def test_sixteen_bits_on_the_hop_need_no_ggml(tiny_folder, tmp_path):
    tokens, _ = answers(tiny_folder, tmp_path, (TRANSFORMERS | {"activation_dtype": "bfloat16"},) * 3)
    assert [len(got) for _, got in tokens] == [NEW_TOKENS] * len(PROMPTS)
