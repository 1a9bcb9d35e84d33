"""Any process may die: no request of the real model is lost or changes its tokens (design D2)."""

import random

import pytest

from tests.measure.correctness.kills import LAYERS, is_empty
from tests.support.clients.kill_runs import SERVICES_OF, killer, random_moment, requests_of, run_streams
from tests.support.models.equality import first_difference
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import running_cluster, wait_until
from tests.support.processes.stage_rig import running_coordinator, running_stages
from tests.support.stages.executors import exactly

pytestmark = [pytest.mark.timeout(600), pytest.mark.model]
TIMES = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A cluster, and the tokens of its streams in an undisturbed run."""
    with running_cluster(tmp_path_factory.mktemp("kills") / "state", real_model_folder(), 2) as cluster:
        yield cluster, [stream.tokens for stream in run_streams(cluster, "undisturbed", None)]


@pytest.fixture(scope="module")
def undisturbed_ggml(tmp_path_factory):
    """The same with ggml."""
    state = tmp_path_factory.mktemp("kills-ggml") / "state"
    with running_cluster(state, real_model_folder(), 2, **exactly("ggml")) as cluster:
        yield cluster, [stream.tokens for stream in run_streams(cluster, "undisturbed", None)]


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """Two stages, with a relay before the second that can be cut."""
    folder = tmp_path_factory.mktemp("link")
    with (
        running_stages(folder, real_model_folder(), LAYERS, relayed=(1,), NOODLE_TRANSPORT="auto") as rig,
        running_coordinator(rig, folder) as services,
    ):
        yield services, rig.relays[1]


@pytest.fixture(scope="module")
def whole():
    return WholeModel(real_model_folder())


def check_that_all_end_well(services, run, kill, expected, whole):
    """Run all streams with a kill in between: each must have its undisturbed tokens, and no rows may be left."""
    wait_until(services.is_ready, 60, "it is whole again")
    streams = run_streams(services, run, kill, random_moment(random.Random(run)))
    assert [stream.failure for stream in streams] == [""] * len(streams)
    asked = [body for _, body in requests_of(run)]
    for stream, tokens, body in zip(streams, expected, asked, strict=True):
        parted_at = first_difference(tokens, stream.tokens)
        if parted_at is not None:  # rounding may choose the other of two tied logits
            before = [*whole.tokenizer(body["inputs"]).input_ids, *tokens[:parted_at]]
            assert "seed" not in body["parameters"], "a drawn text differs"
            assert whole.best_two_gap(before) < 1e-3
    wait_until(lambda: is_empty(services), 60, "only kept KV rows are left")


@pytest.mark.parametrize("number", range(TIMES))
@pytest.mark.parametrize("kind", [*SERVICES_OF, "valkey, then the coordinator"])
def test_every_request_ends_with_its_own_tokens(undisturbed, whole, kind, number):
    cluster, expected = undisturbed
    run = f"{kind.replace(' ', '-').replace(',', '')}-{number}"
    check_that_all_end_well(cluster, run, killer(cluster, kind), expected, whole)


@pytest.mark.parametrize("kind", ["stage 0", "stage 1", "coordinator", "all of machine A"])
def test_every_request_ends_with_its_own_tokens_where_ggml_computes(undisturbed_ggml, whole, kind):
    cluster, expected = undisturbed_ggml
    check_that_all_end_well(cluster, kind.replace(" ", "-"), killer(cluster, kind), expected, whole)


@pytest.mark.parametrize("number", range(TIMES))
def test_every_request_ends_with_its_own_tokens_though_the_link_is_cut(undisturbed, linked, whole, number):
    services, cable = linked
    connections = cable.connections
    check_that_all_end_well(services, f"link-{number}", cable.cut, undisturbed[1], whole)
    assert cable.connections > connections, "nothing was cut"
