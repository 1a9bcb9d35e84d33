from __future__ import annotations

import math

import pytest

from noodle.cluster.measuring import Difference, PromptResult
from noodle.errors import UnsupportedModel
from services.cli.verify.bounds import (
    BOUNDS,
    SAME_BOUNDS,
    advice,
    allowed_differences,
    format_of,
    judge,
    loosest,
    reference_dtype,
)


def result(tokens: int = 64, error: float = 1e-5, gaps: tuple[float, ...] = ()) -> PromptResult:
    differences = tuple(Difference(index, 5, 7, gap, gap) for index, gap in enumerate(gaps))
    return PromptResult(10, tokens, error, differences)


def test_float32_that_is_equal_holds() -> None:
    verdict = judge("float32", BOUNDS["float32"], [result()] * 20)
    assert (verdict.tokens, verdict.top1_agreement, verdict.broken) == (1280, 1.0, ())


def test_float32_may_differ_once_in_a_thousand_where_two_tokens_tie() -> None:
    assert not judge("float32", BOUNDS["float32"], [result(gaps=(5e-4,)), *[result()] * 19]).broken
    assert judge("float32", BOUNDS["float32"], [result(gaps=(5e-4, 5e-4)), *[result()] * 19]).broken
    assert judge("float32", BOUNDS["float32"], [result(gaps=(2e-3,)), *[result()] * 19]).broken


def test_a_logprob_beyond_the_bound_breaks_it() -> None:
    assert judge("float32", BOUNDS["float32"], [result(error=2e-3)]).broken
    assert not judge("float16", BOUNDS["float16"], [result(error=2e-3)]).broken
    assert judge("float16", BOUNDS["float16"], [result(error=0.06)]).broken
    assert not judge("bfloat16", BOUNDS["bfloat16"], [result(error=0.06)]).broken
    assert judge("bfloat16", BOUNDS["bfloat16"], [result(error=math.nan)]).broken


@pytest.mark.parametrize(
    ("tokens", "agreement", "allowed"),
    [  # summed with exact fractions
        (1, 0.94, 1),
        (8, 0.94, 3),
        (100, 0.95, 13),
        (640, 0.94, 58),
        (20480, 0.94, 1335),
        (100, 0.0, 100),
        (100, 1.0, 0),
    ],
)
def test_chance_allows_more_of_few_tokens(tokens: int, agreement: float, allowed: int) -> None:
    assert allowed_differences(tokens, agreement) == allowed


def test_one_of_eight_tokens_proves_nothing() -> None:
    assert not judge("stored", SAME_BOUNDS["stored"], [result(tokens=8, gaps=(0.01,))]).broken
    assert judge("stored", SAME_BOUNDS["stored"], [result(tokens=8, gaps=(0.01,) * 4)]).broken


def test_lower_precision_is_held_to_its_share_of_likeliest_tokens() -> None:
    many = [result()] * 19
    assert not judge("float16", BOUNDS["float16"], [result(gaps=(0.5,) * 64), *many]).broken
    (reason,) = judge("float16", BOUNDS["float16"], [result(tokens=100, gaps=(0.5,) * 20)]).broken
    assert reason == "20 of 100 tokens are not the unsplit model's most likely; the bound of 95% and chance allow 13"
    assert not judge("bfloat16", BOUNDS["bfloat16"], [result(tokens=100, gaps=(0.5,) * 20)]).broken


def test_a_broken_bound_says_what_to_do() -> None:
    few = judge("stored", SAME_BOUNDS["stored"], [result(tokens=8, gaps=(0.01,) * 8)])
    assert "without --prompts" in advice(few)
    many = judge("stored", SAME_BOUNDS["stored"], [result(error=5.0)] * 20)
    assert "NOODLE_QUALITY=exact" in advice(many)
    assert "NOODLE_QUALITY" not in advice(judge("float32", BOUNDS["float32"], [result(error=5.0)] * 20))


def test_nothing_generated_proves_nothing() -> None:
    assert judge("float32", BOUNDS["float32"], []).broken


def test_the_loosest_format_of_a_mixed_cluster_decides() -> None:
    assert loosest(["float32", "float16"]) == "float16"
    assert loosest(["bfloat16", "float32"]) == "bfloat16"
    with pytest.raises(UnsupportedModel):
        loosest(["float32", "q3_K"])


@pytest.mark.parametrize(
    ("stage", "bound"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "executor": "ggml", "weights": "f32", "kv_dtype": "f32"}, "float32"),
        ({"dtype": "float32", "executor": "ggml", "weights": "q8_0", "kv_dtype": "f16"}, "q8_0"),
        ({"dtype": "bfloat16", "executor": "transformers", "weights": "bf16", "kv_dtype": "bf16"}, "bfloat16"),
        ({"dtype": "float32", "hop_dtypes": ["float16"]}, "float16"),
        ({"dtype": "float32", "hop_dtypes": ["float16", "int8"]}, "q8_0"),
    ],
)
def test_the_bound_of_a_stage_is_its_weights_or_its_hops(stage: dict[str, object], bound: str) -> None:
    assert format_of(stage) == bound
    assert reference_dtype(bound) == (bound if bound.startswith(("float", "bfloat")) else "float32")
