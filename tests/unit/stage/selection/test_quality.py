"""Perplexity and greedy agreement, computed a few layers at a time."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from noodle.errors import UnsupportedModel
from noodle.model.formats import Quality
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
from services.stage.selection import quality
from services.stage.selection.benchmark import keep, read_kept
from services.stage.selection.quality import (
    ModelQuality,
    quality_of,
    score_text,
    text_tokens,
)

TOKENS = list(np.random.default_rng(1).integers(1, 190, 150))
BFLOAT16 = Candidate("transformers", "bf16", "bf16", "bfloat16")


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
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json cannot be read"):
        text_tokens(tmp_path, 100)


def test_a_measured_quality_is_kept_until_the_file_is_damaged(tmp_path):
    path, measured = tmp_path / quality.FILE_NAME, Quality(1.002, 0.98, 700)
    keep(path, "q8_0", measured)
    keep(path, "f16", Quality(1.0, 1.0, 700))
    assert read_kept(path, "q8_0", Quality) == measured
    assert read_kept(path, "q4_0", Quality) is None
    path.write_text('{"q8_0": {"perplexity_ratio": "good"}}')
    assert read_kept(path, "q8_0", Quality) is None


def qualities(folder, cache_dir, told=lambda *_: None, fetch=lambda _keys: None):
    return ModelQuality(
        folder=folder,
        digest="digest",
        layer_count=6,
        context_length=256,
        device="cpu",
        threads=1,
        cache_dir=cache_dir,
        progress=told,
        fetch=fetch,
    )


def test_it_is_measured_once_with_the_reference_and_kept(tiny_folder, tmp_path, monkeypatch):
    told = []
    measured = qualities(tiny_folder, tmp_path, lambda _done, what: told.append(what)).of(BFLOAT16, 0.001)
    assert abs(measured.perplexity_ratio - 1) < 0.05
    assert any("quality of transformers f32" in what for what in told)
    monkeypatch.setattr(quality, "score_text", lambda *_: pytest.fail("measured again"))
    assert qualities(tiny_folder, tmp_path).of(BFLOAT16, 0.001) == measured


def test_other_formats_are_measured_for_themselves(tiny_folder, tmp_path):
    model = qualities(tiny_folder, tmp_path)
    first = model.of(BFLOAT16, 0.001)
    other = model.of(dataclasses.replace(BFLOAT16, weights="f16", kv_dtype="f16", dtype="float16"), 0.001)
    assert other != first


def test_what_is_not_here_is_fetched_for_it(tiny_folder, tmp_path):
    fetched = []
    qualities(tiny_folder, tmp_path, fetch=fetched.extend).of(BFLOAT16, 0.001)
    assert any("layers.5." in key for key in fetched)


def test_what_would_take_longer_than_a_start_may_is_not_measured(tiny_folder, tmp_path):
    with pytest.raises(UnsupportedModel, match="minutes"):
        qualities(tiny_folder, tmp_path).of(BFLOAT16, 60.0)
    assert not list(tmp_path.glob("**/quality.json"))
