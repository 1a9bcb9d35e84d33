"""Models in quantized forms are computed by transformers with the values that the forms stand for."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from services.stage.executors.transformers.loading import load_slice
from tests.support.models.quantized_model import FORMS, model_with_mxfp4_experts, quantize_model
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", weight_scale=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_model_has_the_logits_of_its_values(form: str, source: Path, tmp_path: Path) -> None:
    quantized, plain = quantize_model(source, tmp_path, form)
    sessions = random_sessions(LENGTHS)
    pipeline = SlicePipeline(quantized, (0, 2, 6))
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(plain, sessions)) < 1e-5
    assert all("as f32" in each.weights_note and "rounded" not in each.weights_note for each in pipeline.slices)


def test_only_the_parts_of_a_slices_own_matrices_are_fetched(source: Path, tmp_path: Path) -> None:
    quantized, _ = quantize_model(source, tmp_path, "gptq")
    fetched: set[str] = set()
    load_slice(
        quantized, 2, 4, device="cpu", dtype="bfloat16", context_length=64, fetch=lambda keys: fetched.update(keys)
    )
    stored = load_file(quantized / "model.safetensors")
    assert fetched == {key for key in stored if ".layers.2." in key or ".layers.3." in key}


def test_experts_in_mxfp4_are_turned_to_how_transformers_holds_them(tmp_path: Path) -> None:
    quantized, plain = model_with_mxfp4_experts(tmp_path)
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(quantized, (0, 2, 6)).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(plain, sessions)) < 1e-5
    assert np.isfinite(got[0]).all()
