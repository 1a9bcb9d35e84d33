"""Clusters that several files share; after each test a shared cluster must be as it was found."""

import contextlib

import pytest

from tests.support.models.real_model import real_model_file, real_model_folder
from tests.support.processes.cluster import running_cluster, wait_until
from tests.support.stages.executors import exactly

ALICE, BOB = "alices-secret", "bobs-secret"
AS_FOUND_SECONDS = 60.0


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return a function that starts a shared cluster; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        clusters = []

        def start(model, **variables):
            state = tmp_path_factory.mktemp("shared") / "state"
            clusters.append(stack.enter_context(running_cluster(state, model, 2, **variables)))
            return clusters[-1]

        start.clusters = clusters
        yield start


@pytest.fixture(autouse=True)
def shared_clusters_are_as_found(request, shared):
    """Each shared cluster that a test used is ready, runs no request and holds only rows kept for prefix reuse."""
    yield
    for cluster in shared.clusters:
        if any(value is cluster for value in request.node.funcargs.values()):
            wait_until(lambda cluster=cluster: cluster.is_ready() and cluster.is_empty(), AS_FOUND_SECONDS, "as found")


@pytest.fixture(scope="session")
def cluster(shared, tiny_folder):
    """Two stages of the tiny model."""
    return shared(tiny_folder)


@pytest.fixture(scope="session")
def keyed(shared, tiny_folder):
    """Two stages of the tiny model behind the API keys of Alice and Bob, with one layer on the second stage."""
    return shared(tiny_folder, NOODLE_API_KEY=f"alice:{ALICE},bob:{BOB}", NOODLE_SPLIT="5,1")


@pytest.fixture(scope="session")
def real_cluster(shared):
    """Two stages of the real model's file."""
    return shared(real_model_file())


@pytest.fixture(scope="session")
def real_transformers_cluster(shared):
    """Two stages of the real model, computed by transformers."""
    return shared(real_model_folder(), **exactly("transformers"))
