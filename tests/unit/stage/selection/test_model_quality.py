"""A model's quality in a format: measured once, kept for its formats, found by the next stage."""

import dataclasses

import pytest

from noodle.errors import UnsupportedModel
from services.stage.executors.candidate import Candidate
from services.stage.selection import model_quality
from services.stage.selection.model_quality import ModelQuality

BFLOAT16 = Candidate("transformers", "bf16", "bf16", "bfloat16")


def qualities(folder, cache_dir, told=lambda *_: None, fetch=lambda _keys: None):
    return ModelQuality(folder, "digest", 6, 256, "cpu", 1, cache_dir, told, fetch)


def test_it_is_measured_once_with_the_reference_and_kept(tiny_folder, tmp_path, monkeypatch):
    told = []
    measured = qualities(tiny_folder, tmp_path, lambda _done, what: told.append(what)).of(BFLOAT16, 0.001)
    assert abs(measured.perplexity_ratio - 1) < 0.05
    assert any("quality of transformers f32" in what for what in told)
    monkeypatch.setattr(model_quality, "score_text", lambda *_: pytest.fail("measured again"))
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
