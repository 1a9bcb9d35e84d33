import pytest

from tests.support.processes.cluster import running_cluster


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    """Two stages of the tiny model; tests that break it wait until it is whole again."""
    with running_cluster(tmp_path_factory.mktemp("cluster") / "state", tiny_folder, 2) as running:
        yield running
