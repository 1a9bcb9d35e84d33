"""The types that a quantized model's header lets a planner expect are those in which a stage holds it."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from noodle.model.files import read_config, read_tensor_entries
from noodle.model.quantization import held_tensors
from services.stage.executors.tensor_files import open_tensor_files
from tests.support.models.quantized_model import FORMS, quantize_model
from tests.support.models.tiny_model import make_tiny_model

GOLDEN = Path(__file__).parents[2] / "stage" / "executors" / "checkpoints" / "golden.safetensors"
with safe_open(GOLDEN, "pt") as golden:
    CASES = {name: json.loads(text) for name, text in golden.metadata().items()}


def differences(folder: Path) -> dict[str, tuple[object, object]]:
    """What a stage holds in another type, or in other bytes, than was expected."""
    expected = held_tensors(read_config(folder), read_tensor_entries(folder))
    files = open_tensor_files(folder)
    held = {name: files.find(name) for name in expected}
    return {
        name: (entry, held[name])
        for name, entry in expected.items()
        if (found := held[name]) is None or (entry.dtype, entry.byte_count) != (found.dtype, found.byte_count)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", weight_scale=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_all_tensors_of_a_model_are_expected_as_they_are_held(form: str, source: Path, tmp_path: Path) -> None:
    quantized, plain = quantize_model(source, tmp_path, form)
    assert differences(quantized) == {}
    expected = held_tensors(read_config(quantized), read_tensor_entries(quantized))
    assert expected.keys() == read_tensor_entries(plain).keys()


@pytest.mark.parametrize("name", CASES)
def test_matrices_that_other_libraries_wrote_are_expected_as_they_are_held(name: str, tmp_path: Path) -> None:
    with safe_open(GOLDEN, "pt") as golden:
        keys = [key for key in golden.keys() if key.startswith(f"{name}/m.")]  # noqa: SIM118
        save_file({key.partition("/")[2]: golden.get_tensor(key) for key in keys}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": CASES[name]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert differences(tmp_path) == {}


def test_a_model_that_is_not_quantized_is_held_as_it_is(source: Path) -> None:
    entries = read_tensor_entries(source)
    assert held_tensors(read_config(source), entries) is entries
