import os
import time

import pytest

from tests.engine.engine import CONTROL, STAGE, WITH_TRANSFORMERS, build, require_base_images, require_engine
from tests.engine.project import Project
from tests.support.models.real_model import real_model_folder


@pytest.fixture(scope="session", autouse=True)
def engine():
    """Require an engine with the base images; skip these tests without one, fail in CI."""
    require_engine()
    require_base_images()


@pytest.fixture(scope="session")
def images(engine):
    """The images that noodle has by default, built from this folder."""
    _build_all({"control": CONTROL, "stage": STAGE})


@pytest.fixture(scope="session")
def image_with_transformers(engine):
    """The image of a stage with torch, built from this folder.

    torch comes from the index that pip is set to unless TORCH_INDEX_URL names another: an index with wheels for CPUs
    alone is not reached everywhere.
    """
    _build_all({"stage-transformers": WITH_TRANSFORMERS}, TORCH_INDEX_URL=os.environ.get("TORCH_INDEX_URL", ""))
    return WITH_TRANSFORMERS


def _build_all(tags, **arguments):
    seconds = {}
    for target, tag in tags.items():
        began = time.monotonic()
        build("Dockerfile.cpu", target, tag, **arguments)
        seconds[target] = time.monotonic() - began
    print("images built in", {target: f"{taken:.1f} s" for target, taken in seconds.items()})


@pytest.fixture(scope="module")
def project(images, tmp_path_factory):
    """A complete noodle on one host, started as in the README: init, then up."""
    project = Project(tmp_path_factory.mktemp("single"))
    try:
        project.init()
        project.up()
        print(f"one host: ready {project.wait_ready():.1f} s after up")
        yield project
    finally:
        project.down()
    assert project.left_behind() == []


@pytest.fixture(scope="session")
def model_folder():
    """The folder of the unsplit model on this host."""
    return real_model_folder()
