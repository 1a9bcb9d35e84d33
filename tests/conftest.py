import pytest

from tests.support.models.tiny_model import tiny_llama_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random llama of 6 layers with a tokenizer, small enough to start in seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama_folder(folder)
    return folder
