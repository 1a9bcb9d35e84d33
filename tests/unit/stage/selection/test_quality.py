"""Perplexity and greedy agreement, computed a few layers at a time."""

import math

import numpy as np
import pytest
import torch
import transformers

from noodle.errors import UnsupportedModel
from noodle.model.formats import Quality
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
from services.stage.selection import quality
from services.stage.selection.quality import keep_quality, kept_quality, quality_of, score_text, text_tokens

TOKENS = list(np.random.default_rng(1).integers(1, 190, 150))
FLOAT32 = Candidate("transformers", "f32", "f32", "float32")


def scored(folder, dtype="float32", activation_dtype="float32"):
    candidate = Candidate("transformers", "x", "x", dtype)
    options = {"device": "cpu", "threads": 1, "context_length": 256, "cache_dir": None}
    return score_text(
        lambda start, end: load_by(candidate, folder, start, end, **options),
        6,
        TOKENS,
        lambda *_: None,
        activation_dtype,
    )


@pytest.mark.parametrize("layers_at_once", [1, 4, 6])
def test_the_loss_is_the_whole_models_however_many_layers_are_loaded_at_once(tiny_folder, monkeypatch, layers_at_once):
    monkeypatch.setattr(quality, "LAYERS_AT_ONCE", layers_at_once)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(TOKENS[1:]), reduction="none").numpy()
    score = scored(tiny_folder)
    assert np.abs(score.losses - expected).max() < 1e-4
    assert (score.greedy == logits.argmax(1).numpy()).all()


def test_float32_against_itself_loses_nothing_and_fewer_bits_lose_a_little(tiny_folder, monkeypatch):
    monkeypatch.setattr(quality, "LAYERS_AT_ONCE", 3)
    reference = scored(tiny_folder)
    assert quality_of(reference, reference) == Quality(1.0, 1.0, 149)
    lossy = quality_of(scored(tiny_folder, "bfloat16"), reference)
    assert 0 < abs(lossy.perplexity_ratio - 1) < 0.05
    assert quality_of(scored(tiny_folder, activation_dtype="int8"), reference).perplexity_ratio != 1.0


def test_the_text_is_cut_to_the_models_context(tiny_folder):
    assert len(text_tokens(tiny_folder, 100)) == 100


def test_a_model_without_a_tokenizer_can_not_be_tried_and_says_so(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json can not be read"):
        text_tokens(tmp_path, 100)


def test_what_was_measured_is_kept_until_the_file_is_damaged(tmp_path):
    measured = Quality(1.002, 0.98, 700)
    keep_quality(tmp_path, "q8_0", measured)
    keep_quality(tmp_path, "f16", Quality(1.0, 1.0, 700))
    assert kept_quality(tmp_path, "q8_0") == measured
    assert kept_quality(tmp_path, "q4_0") is None
    (tmp_path / quality.FILE_NAME).write_text('{"q8_0": {"perplexity_ratio": "good"}}')
    assert kept_quality(tmp_path, "q8_0") is None
    assert math.isfinite(measured.perplexity_ratio)
