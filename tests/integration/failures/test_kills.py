"""Any process may die: no request of the real model is lost or changes its tokens (design D2)."""

import random

import pytest

from tests.measure.correctness.kills import LAYERS
from tests.support.clients.kill_runs import SERVICES_OF, killer, random_moment, requests_of, run_streams
from tests.support.models.equality import first_difference
from tests.support.models.real_model import real_model_file, real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import running_cluster, wait_until
from tests.support.processes.stage_rig import running_coordinator, running_stages
from tests.support.sampling import sampled

pytestmark = [pytest.mark.timeout(600), pytest.mark.model]


@pytest.fixture(scope="module")
def as_stored(tmp_path_factory):
    """Two stages of the real model's file, computed as a person's machine does: in its Q4_1."""
    state = tmp_path_factory.mktemp("stored") / "state"
    with running_cluster(state, real_model_file(), 2, NOODLE_QUALITY="stored") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed_as_stored(as_stored):
    """The tokens of the streams in an undisturbed run of it."""
    return [stream.tokens for stream in run_streams(as_stored, "undisturbed", None)]


@pytest.fixture(scope="module")
def undisturbed(real_cluster):
    """The tokens of the streams in an undisturbed run."""
    return [stream.tokens for stream in run_streams(real_cluster, "undisturbed", None)]


@pytest.fixture(scope="module")
def undisturbed_transformers(real_transformers_cluster):
    """The same with ggml."""
    return [stream.tokens for stream in run_streams(real_transformers_cluster, "undisturbed", None)]


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


def check_that_all_end_well(services, run, kill, expected, whole=None):
    """Run all streams with a kill in between: each must have its undisturbed tokens, and no rows may be left.

    With `whole`, a greedy stream may part where two tokens tie.
    """
    wait_until(services.is_ready, 60, "it is whole again")
    streams = run_streams(services, run, kill, random_moment(random.Random(run)))
    assert [stream.failure for stream in streams] == [""] * len(streams)
    asked = [body for _, body in requests_of(run)]
    for stream, tokens, body in zip(streams, expected, asked, strict=True):
        parted_at = first_difference(tokens, stream.tokens)
        if parted_at is not None:  # rounding may choose the other of two tied logits
            assert whole is not None, f"{body} parts at token {parted_at}"
            before = [*whole.tokenizer(body["inputs"]).input_ids, *tokens[:parted_at]]
            assert "seed" not in body["parameters"], "a drawn text differs"
            assert whole.best_two_gap(before) < 1e-3
    wait_until(services.is_empty, 60, "only kept KV rows are left")


@sampled("number", range(2), (0,))
@pytest.mark.parametrize("kind", [*SERVICES_OF, "valkey, then the coordinator"])
def test_every_request_ends_with_its_own_tokens(as_stored, undisturbed_as_stored, kind, number):
    """Without exception: a token's logits are the same bits in any company (ADR 37)."""
    run = f"{kind.replace(' ', '-').replace(',', '')}-{number}"
    check_that_all_end_well(as_stored, run, killer(as_stored, kind), undisturbed_as_stored)


@pytest.mark.parametrize("kind", ["stage 0", "stage 1", "coordinator", "all of machine A"])
def test_every_request_ends_with_its_own_tokens_where_transformers_computes(
    real_transformers_cluster, undisturbed_transformers, whole, kind
):
    kill = killer(real_transformers_cluster, kind)
    check_that_all_end_well(real_transformers_cluster, kind.replace(" ", "-"), kill, undisturbed_transformers, whole)


@sampled("number", range(2), (0,))
def test_every_request_ends_with_its_own_tokens_though_the_link_is_cut(undisturbed, linked, whole, number):
    services, cable = linked
    connections = cable.connections
    check_that_all_end_well(services, f"link-{number}", cable.cut, undisturbed, whole)
    assert cable.connections > connections, "nothing was cut"
