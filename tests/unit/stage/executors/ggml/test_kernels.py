"""noodle's own C functions are loaded where they were built, and missed without harm where they were not."""

import importlib.machinery
import logging
import os

import pytest

from services.stage.executors.ggml.kernels.library import LIBRARY_NAME, own_library


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package named ggml that has a folder of libraries."""
    spec = importlib.machinery.ModuleSpec("ggml", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("services.stage.executors.ggml.backend.importlib.util.find_spec", lambda _: spec)
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def test_it_is_built_where_ggml_is():
    library = own_library()
    if library is None and not os.environ.get("CI"):
        pytest.skip("noodle's own library was not built")
    assert library is not None


def test_where_it_was_not_built_there_is_none(package):
    assert own_library() is None


def test_where_ggml_is_not_installed_there_is_none(monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.backend.importlib.util.find_spec", lambda _: None)
    assert own_library() is None


def test_one_that_can_not_be_loaded_is_named_and_missed(package, caplog):
    (package / LIBRARY_NAME).write_bytes(b"no library")
    with caplog.at_level(logging.WARNING):
        assert own_library() is None
    assert str(package / LIBRARY_NAME) in caplog.text
