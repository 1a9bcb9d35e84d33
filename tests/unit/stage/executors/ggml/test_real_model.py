"""The default model, computed exactly by ggml: the same greedy tokens as transformers', up to ties (design D3)."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from services.stage.executors.base import Span
from tests.support.models.real_model import real_model_folder
from tests.support.stages.slice_pipeline import SlicePipeline

PROMPTS = ("Write a short story about a lighthouse.", "def fibonacci(n):")
NEW_TOKENS = 16
TIE = 1e-3  # two best logits nearer than this may change places


def greedy(pipeline, session_id, ids):
    """The tokens that follow, and how far the two best logits of each lie apart."""
    tokens, gaps, given, position = [], [], np.array(ids), 0
    for _ in range(NEW_TOKENS):
        span = Span(session_id, position, len(given), len(ids) + NEW_TOKENS)
        row = pipeline.step([span], given, [len(given) - 1])[0]
        best, second = np.argsort(row)[::-1][:2]
        tokens.append(int(best))
        gaps.append(float(row[best] - row[second]))
        position += len(given)
        given = np.array([best])
    return tokens, gaps


@pytest.mark.model
def test_greedy_tokens_are_those_of_transformers_in_one_slice_and_in_three():
    folder = real_model_folder()
    reference = SlicePipeline(folder, (0, 30), context_length=8192)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        expected, gaps = greedy(reference, prompt, ids)
        for cuts in ((0, 30), (0, 11, 22, 30)):
            ours = SlicePipeline(folder, cuts, executor="ggml", context_length=8192)
            got, _ = greedy(ours, prompt, ids)
            different = next((index for index in range(NEW_TOKENS) if got[index] != expected[index]), None)
            assert different is None or gaps[different] < TIE, (prompt, cuts, different, gaps[different])
