"""`--all` runs every test; without it, tests and parameters marked `full` are left to `make test-all`."""

import pytest

from tests.support.models.tiny_model import tiny_llama_folder


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked `full` too, of which others are a sample")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random llama of 6 layers with a tokenizer, small enough to start in seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama_folder(folder)
    return folder
