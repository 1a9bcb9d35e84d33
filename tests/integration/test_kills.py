"""Whatever dies, no request of the real model is lost, and its tokens are those of the undisturbed run (design D2)."""

import random

import pytest

from tests.measure.kills import is_empty
from tests.support.cluster import running_cluster, wait_until
from tests.support.equality import first_difference
from tests.support.kill_runs import SERVICES_OF, killer, random_moment, requests_of, run_streams
from tests.support.real_model import real_model_folder
from tests.support.whole_model import WholeModel

pytestmark = [pytest.mark.timeout(600), pytest.mark.model]
TIMES = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A cluster, and what its streams say when nothing dies."""
    with running_cluster(tmp_path_factory.mktemp("kills") / "state", real_model_folder(), 2) as cluster:
        yield cluster, [stream.tokens for stream in run_streams(cluster, "undisturbed", None)]


@pytest.fixture(scope="module")
def whole():
    return WholeModel(real_model_folder())


@pytest.mark.parametrize("number", range(TIMES))
@pytest.mark.parametrize("kind", [*SERVICES_OF, "valkey, then the coordinator"])
def test_every_request_ends_with_its_own_tokens(undisturbed, whole, kind, number):
    cluster, expected = undisturbed
    wait_until(cluster.is_ready, 60, "it is whole again")
    run = f"{kind.replace(' ', '-').replace(',', '')}-{number}"
    streams = run_streams(cluster, run, killer(cluster, kind), random_moment(random.Random(run)))
    assert [stream.failure for stream in streams] == [""] * len(streams)
    asked = [body for _, body in requests_of(run)]
    for stream, tokens, body in zip(streams, expected, asked, strict=True):
        parted_at = first_difference(tokens, stream.tokens)
        if parted_at is not None:  # rounding may choose the other of two logits that are as good as equal
            before = [*whole.tokenizer(body["inputs"]).input_ids, *tokens[:parted_at]]
            assert "seed" not in body["parameters"], "a drawn text differs"
            assert whole.best_two_gap(before) < 1e-3
    wait_until(lambda: is_empty(cluster), 60, "only kept KV rows are left")
