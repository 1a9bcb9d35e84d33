"""The unsplit model by the cluster's own executors: against transformers, and in parts."""

import importlib.util

import msgspec
import numpy as np
import pytest

from noodle.cluster.measuring import GreedyAnswer, ReferencePart, ReferenceQuestion
from services.stage.tools import reference
from services.stage.tools.reference import compare_logits, compare_with_parts
from tests.support.models.tiny_model import LAYER_COUNT as LAYERS

NEW_TOKENS = 12
needs_ggml = pytest.mark.skipif(importlib.util.find_spec("ggml") is None, reason="ggml is not installed (make ggml)")


def part(start, end, executor="ggml"):
    return ReferencePart(start, end, executor, weights="f32", kv_dtype="f32", dtype="float32")


@needs_ggml
@pytest.mark.parametrize(
    "parts",
    [(part(0, LAYERS),), (part(0, 1), part(1, 3), part(3, LAYERS)), (part(0, 2), part(2, LAYERS, "transformers"))],
    ids=["whole", "three parts", "two executors"],
)
@pytest.mark.parametrize("chunk_tokens", [512, 5])
def test_the_tokens_that_transformers_makes_are_the_most_likely_ones(
    folder, answered, parts, chunk_tokens, monkeypatch
):
    monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk_tokens)
    question = ReferenceQuestion(str(folder), 256, (answered, answered), parts=parts, threads=1)
    told = []
    for result in compare_with_parts(question, told.append):
        assert (result.tokens, result.differences) == (NEW_TOKENS, ())
        assert result.largest_logprob_error < 1e-4
    assert told == [0, 1, 2]


def test_a_token_with_exactly_the_best_logit_is_the_most_likely_too():
    logits = np.array([[1.0, 3.0, 3.0], [0.0, 2.0, 1.0]], np.float32)
    answer = GreedyAnswer("", (7,), (2, 2), tuple(np.log([np.exp(3) / (np.e + 2 * np.exp(3)), 0.5])))
    result = compare_logits(logits, answer)
    (difference,) = result.differences
    assert (difference.index, difference.token_id, difference.best_token_id) == (1, 2, 1)
    assert difference.logit_gap == difference.two_best_gap == 1.0
    exact = np.exp(1) / (1 + np.exp(1) + np.exp(2))
    assert result.largest_logprob_error == pytest.approx(abs(np.log(0.5) - np.log(exact)))


def test_a_question_survives_the_way_to_its_process():
    question = ReferenceQuestion("/models/x.gguf", 64, (GreedyAnswer("a", (1, 2), (3,), (-0.5,)),), parts=(part(0, 4),))
    assert msgspec.json.decode(msgspec.json.encode(question), type=ReferenceQuestion) == question
