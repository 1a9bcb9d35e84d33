"""Models in quantized forms have the logits of transformers with the values that the forms stand for."""

import logging
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from noodle.model.files import read_header
from services.stage.executors.ggml.slice import GgmlSlice
from tests.support.models.quantized_model import FORMS, model_with_mxfp4_experts, quantize_model
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)
# how a form is held, and how near its logits are: activations are rounded to 8 bits for blocks, to 16 for float16
HELD = {
    "awq": ("read from AWQ 4 bit as q5_0", 4e-2),
    "gptq": ("read from GPTQ 4 bit as q4_0", 4e-2),
    "gptq act order": ("read from GPTQ 4 bit as f16 (rounded)", 5e-3),
    "gptq v2": ("read from GPTQ 4 bit as q5_0", 4e-2),
    "int4": ("read from compressed-tensors int4 as q4_0", 4e-2),
    "int8": ("read from compressed-tensors int8 as q8_0", 4e-2),
    "fp8": ("read from FP8 as f16 (rounded); activations are not quantized", 5e-3),
    "fp8 rows": ("read from FP8 as f16 (rounded)", 5e-3),
    "nf4": ("read from bitsandbytes nf4 as f16 (rounded)", 5e-3),
}


@pytest.fixture(autouse=True)
def ggml_is_here() -> None:
    need_ggml()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", weight_scale=0.05)


def load(folder: Path, start: int, end: int, **options: object) -> GgmlSlice:
    return load_by_ggml(folder, start, end, **{"context_length": 256, "threads": 2, "kv_dtype": "f32", **options})


def test_every_form_is_tested() -> None:
    assert HELD.keys() == FORMS.keys()


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_quantized_model_have_its_exact_values_when_converted_to_float32(
    form: str, source: Path, tmp_path: Path
) -> None:
    quantized, plain = quantize_model(source, tmp_path, form)
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(quantized, (0, 2, 6), executor="ggml", threads=2).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(plain, sessions)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_model_is_computed_in_the_nearest_type_which_is_said(
    form: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held, bound = HELD[form]
    quantized, plain = quantize_model(source, tmp_path, form)
    sessions = random_sessions(LENGTHS)
    with caplog.at_level(logging.INFO):
        pipeline = SlicePipeline(quantized, (0, 2, 6), executor="ggml", weights="stored", threads=2)
    assert [each.weights_note for each in pipeline.slices] == [held, held]
    assert held in caplog.text
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(plain, sessions)) < bound


@pytest.mark.parametrize("form", FORMS)
def test_a_slice_fetches_all_parts_of_its_own_matrices_and_no_others(form: str, source: Path, tmp_path: Path) -> None:
    quantized, _ = quantize_model(source, tmp_path, form)
    fetched: list[set[str]] = []
    for start, end in pairwise((0, 2, 5, 6)):
        keys: set[str] = set()
        load(quantized, start, end, weights="stored", fetch=keys.update)
        fetched.append(keys)
        named = {int(key.split(".")[2]) for key in keys if key.startswith("model.layers.")}
        assert named == set(range(start, end))
    with safe_open(quantized / "model.safetensors", "pt") as stored:
        assert set.union(*fetched) == set(stored.keys())


def test_other_weights_are_converted_from_the_forms_values(source: Path, tmp_path: Path) -> None:
    quantized, plain = quantize_model(source, tmp_path, "awq")
    sessions = random_sessions(LENGTHS)
    got, expected = (
        SlicePipeline(folder, (0, 6), executor="ggml", weights="q8_0").run(sessions, STEPS)
        for folder in (quantized, plain)
    )
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))


# blocks of MXFP4 are multiplied by activations in 8 bits
@pytest.mark.parametrize(("weights", "bound"), [("f32", 1e-5), ("f16", 5e-3), ("q8_0", 4e-2), ("stored", 4e-2)])
def test_experts_in_mxfp4_have_the_logits_of_their_values(weights: str, bound: float, tmp_path: Path) -> None:
    quantized, plain = model_with_mxfp4_experts(tmp_path)
    sessions = random_sessions(LENGTHS)
    pipeline = SlicePipeline(quantized, (0, 1, 3, 6), executor="ggml", weights=weights)
    assert relative_difference(pipeline.run(sessions, STEPS), unsplit_logits(plain, sessions)) < bound


@pytest.mark.parametrize(
    ("form", "weights"), [("awq", "stored"), ("fp8", "stored"), ("nf4", "stored"), ("int4", "q8_0")]
)
def test_a_folder_of_holes_is_fetched_before_types_are_decided(
    form: str, weights: str, source: Path, tmp_path: Path
) -> None:
    quantized, _ = quantize_model(source, tmp_path, form)
    holes = tmp_path / "holes"
    holes.mkdir()
    (holes / "config.json").write_bytes((quantized / "config.json").read_bytes())
    whole, empty = quantized / "model.safetensors", holes / "model.safetensors"
    content = whole.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    empty.write_bytes(content[:header_end] + bytes(len(content) - header_end))
    entries = read_header(whole)

    def fetch(keys: Collection[str]) -> None:
        with empty.open("r+b") as file:
            for key in keys:
                first = entries[key].first_byte
                file.seek(first)
                file.write(content[first : first + entries[key].byte_count])

    sessions = random_sessions(LENGTHS)
    got, expected = (
        SlicePipeline(folder, (0, 3, 6), executor="ggml", weights=weights, fetch=fetch).run(sessions, STEPS)
        for folder in (holes, quantized)
    )
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("form", ["awq", "fp8", "int4"])
def test_experts_are_quantized_one_by_one(form: str, model_type: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", model_type, weight_scale=0.05)
    quantized, plain = quantize_model(source, tmp_path, form)
    sessions = random_sessions(LENGTHS)
    expected = unsplit_logits(plain, sessions)
    exact = SlicePipeline(quantized, (0, 2, 6), executor="ggml").run(sessions, STEPS)
    assert relative_difference(exact, expected) < 1e-5
    stored = SlicePipeline(quantized, (0, 2, 6), executor="ggml", weights="stored")
    # activations in 8 bits may choose another expert than float32 does
    assert relative_difference(stored.run(sessions, STEPS), expected) < (0.25 if form != "fp8" else 5e-3)
