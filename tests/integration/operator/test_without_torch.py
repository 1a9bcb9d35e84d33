"""The default: `noodle up` with the default model, where torch and transformers are not installed."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.models.real_model import real_model_file
from tests.support.processes.cluster import running_cluster

HIDING = Path(__file__).parents[2] / "support" / "without_torch"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    path = os.pathsep.join([str(HIDING), *filter(None, [os.environ.get("PYTHONPATH")])])
    state_dir = tmp_path_factory.mktemp("without-torch") / "state"
    with running_cluster(state_dir, real_model_file(), 2, NOODLE_QUALITY="stored", PYTHONPATH=path) as cluster:
        yield cluster


def test_the_default_model_is_computed_by_ggml_from_its_own_file(cluster):
    answer = cluster.generate("The capital of France is", max_new_tokens=8)
    assert "Paris" in answer["generated_text"]
    assert all(state["executor"] == "ggml" and state["weights"] == "stored" for state in cluster.stage_states())


def test_verify_compares_with_the_unsplit_file_and_says_nothing_of_transformers(cluster):
    done = cluster.noodle("verify", "--prompts", "6", "--new-tokens", "24", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == {"verdict", "prompts"}
    assert answer["verdict"]["tokens"] == 6 * 24


@pytest.mark.parametrize(("arguments", "what"), [(("bench",), "The control")])
def test_a_command_that_needs_the_extra_names_the_command_that_installs_it(cluster, arguments, what):
    done = cluster.noodle(*arguments)
    assert done.returncode != 0
    assert f"{what} needs torch and transformers, which are not installed here." in done.stderr
    assert "make transformers" in done.stderr
