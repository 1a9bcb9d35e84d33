import pytest

from tests.support.cluster import running_cluster
from tests.tiny_model import tiny_llama_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random llama of 6 layers with a tokenizer, small enough to start in seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama_folder(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    """Two stages of the tiny model; tests that break it wait until it is whole again."""
    with running_cluster(tmp_path_factory.mktemp("cluster") / "state", tiny_folder, 2) as running:
        yield running
