import pytest

from noodle.model.local import served_name
from tests.support.models.tiny_gguf import TinyLlama, write_tiny_gguf


def test_a_folder_of_ones_own_is_called_as_it_is(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_name(folder) == "my-model"


def test_a_folder_of_the_hub_is_called_by_its_model(tmp_path):
    folder = tmp_path / "models--org--tiny-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert served_name(folder) == "tiny-model"


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("a model.Q4_K_M.gguf", "a model.Q4_K_M"),
        ("big-Q8_0-00001-of-00002.gguf", "big-Q8_0"),
        ("sha256-0a1b", "sha256-0a1b"),
    ],
)
def test_a_file_is_called_by_its_name_without_what_every_file_has(name, served, tmp_path):
    write_tiny_gguf(tmp_path / "whole.gguf", TinyLlama()).rename(tmp_path / name)
    assert served_name(tmp_path / name) == served
