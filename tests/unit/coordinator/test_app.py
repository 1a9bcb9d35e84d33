"""Who may ask the coordinator, under which id, from which web page; no process runs."""

import logging

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import MachineReport, Plan, StageAssignment
from noodle.config.environment import coordinator_config
from noodle.errors import NoodleError
from noodle.logs import JsonFormatter, PrettyFormatter, about, add_request_id
from noodle.metrics.counted import CoordinatorMetrics
from services.coordinator.app import create_app
from services.coordinator.coordinator import Coordinator
from services.coordinator.ops.prometheus import stage_targets

TOKEN = "a-token-of-some-length"


def client_of(**variables):
    config = coordinator_config({"NOODLE_CLUSTER_TOKEN": TOKEN, **variables})
    registry = CollectorRegistry()
    return create_app(config, Coordinator(config, CoordinatorMetrics(registry)), registry).test_client()


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_any_client_of_this_machine_may_ask():
    client = client_of()
    assert client.get("/openapi.json").status_code == 200
    assert client.get("/openapi.json", headers={"Host": "evil.example"}).status_code == 401
    assert client.get("/openapi.json", headers={"Host": "evil.example", **bearer(TOKEN)}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/info", "/openapi.json"])
def test_with_keys_each_of_them_and_the_cluster_token_open_and_nothing_else(path):
    client = client_of(NOODLE_API_KEY="alice:one,bob:two")
    opened = [client.get(path, headers=bearer(key)).status_code for key in ("one", "two", TOKEN)]
    assert 401 not in opened
    for headers in ({}, bearer(""), bearer("one,bob"), bearer("alice:one"), bearer("alice"), {"Authorization": "one"}):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.get_json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/tokenize"]
)
def test_a_strangers_body_is_not_looked_at(path):
    answer = client_of(NOODLE_API_KEY="k").post(path, data=b"{", content_type="application/json")
    assert answer.status_code == 401


def test_a_stranger_sees_a_bare_health():
    client = client_of(NOODLE_API_KEY="k")
    assert set(client.get("/health").get_json()) == {"service", "status"}
    assert "stages" in client.get("/health", headers=bearer("k")).get_json()


def test_metrics_want_the_cluster_token_and_no_key_opens_them():
    client = client_of(NOODLE_API_KEY="k")
    assert client.get("/metrics", headers=bearer("k")).status_code == 401
    assert client.get("/metrics", headers=bearer(TOKEN)).status_code == 200


def test_prometheus_is_told_where_everything_is_and_only_with_the_cluster_token():
    client = client_of(
        NOODLE_API_KEY="k",
        NOODLE_MACHINE="machine-a",
        NOODLE_PLANNER_URL="http://planner:8079",
        NOODLE_VALKEY_URL="redis://127.0.0.1:1",  # where nobody is: no stage has said anything
    )
    assert client.get("/prometheus/targets", headers=bearer("k")).status_code == 401
    asked = client.get("/prometheus/targets", headers={"Host": "coordinator:8080", **bearer(TOKEN)})
    assert asked.get_json() == [
        {"targets": ["coordinator:8080"], "labels": {"service": "coordinator", "machine": "machine-a"}},
        {"targets": ["planner:8079"], "labels": {"service": "planner"}},
    ]
    for host, target in (("machine-a", "machine-a:80"), ("[::1]", "[::1]:80"), ("[::1]:8080", "[::1]:8080")):
        asked = client.get("/prometheus/targets", headers={"Host": host, **bearer(TOKEN)})
        assert asked.get_json()[0]["targets"] == [target]


def test_a_stage_is_a_target_where_it_says_it_is_and_stays_one_while_it_is_silent():
    report = MachineReport(
        1, "machine-b", "http://192.168.1.103:8081", "boot", "1", "digest", "cpu", "", "float32", 1, 1, 1.0, 1.0, 1.0
    )
    planned = [
        StageAssignment(0, "machine-a", "http://192.168.1.101:8081", 0, 3, "float32"),
        StageAssignment(1, "machine-b", "http://192.168.1.102:8081", 3, 6, "float32"),
    ]
    plan = Plan(1, "digest", 6, 64, 300, 256, tuple(planned))
    assert stage_targets(None, []) == []
    spare = msgspec.structs.replace(report, stage_id=10, url="http://[fd00::7]:8081")
    assert [(each.targets, each.labels["stage"]) for each in stage_targets(plan, [spare, report])] == [
        (["192.168.1.101:8081"], "0"),
        (["192.168.1.103:8081"], "1"),
        (["[fd00::7]:8081"], "10"),
    ]


def test_every_answer_has_an_id_errors_too():
    client = client_of()
    for path in ("/health", "/nothing", "/v1/models"):
        given = client.get(path, headers={"X-Request-Id": "mine-1"})
        assert given.headers["X-Request-Id"] == "mine-1"
        assert len(client.get(path).headers["X-Request-Id"]) == 32


@pytest.mark.parametrize("strange", ["", "a b", "x" * 65, "a:b", "é", "a/../b", '"'])
def test_an_id_that_may_not_stand_in_a_log_is_replaced(strange):
    assert client_of().get("/health", headers={"X-Request-Id": strange}).headers["X-Request-Id"] != strange


def test_a_log_line_carries_the_id_of_the_request_that_it_is_about():
    lines = []
    handler = logging.Handler()
    handler.addFilter(add_request_id)
    handler.emit = lambda record: lines.append((PrettyFormatter("x").format(record), JsonFormatter("x").format(record)))
    log = logging.getLogger("noodle.web.service")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        client_of().get("/v1/models", headers={"X-Request-Id": "mine-2"})
        log.info("about nobody")
        log.info("about another", extra=about("other"))
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    (pretty, as_json), (nobody, _), (other, _) = lines
    assert pretty.endswith("[request mine-2]")
    assert '"request": "mine-2"' in as_json
    assert "request" not in nobody
    assert other.endswith("[request other]")


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
PAGE = "http://192.168.1.7:3000"


def test_no_web_page_may_ask_unless_its_origin_is_named():
    for client in (client_of(), client_of(NOODLE_CORS_ORIGINS="https://other.example")):
        for answer in (
            client.options("/v1/completions", headers={"Origin": PAGE, **PREFLIGHT}),
            client.get("/health", headers={"Origin": PAGE}),
        ):
            assert not [name for name, _ in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize(("origins", "allowed"), [(f"https://other.example,{PAGE}", PAGE), ("*", "*")])
def test_a_page_of_a_named_origin_may_ask_and_read_answers_and_errors(origins, allowed):
    client = client_of(NOODLE_CORS_ORIGINS=origins, NOODLE_API_KEY="k")
    preflight = client.options("/v1/completions", headers={"Origin": PAGE, **PREFLIGHT})
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == allowed
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in preflight.headers
    refused = client.post("/v1/completions", json={}, headers={"Origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == allowed
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
    assert "Origin" in refused.headers["Vary"]


def test_no_status_of_an_error_is_one_that_the_document_does_not_know():
    """Errors that a public route may raise; those of hops, starts and stored activations never reach a client."""
    from noodle import errors
    from services.coordinator.api.openapi import ERROR_TEXTS

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RequestError)]
    others = [errors.NotReady, errors.QueueUnavailable, errors.RequestTimedOut, NoodleError]
    statuses = {kind.http_status for kind in [*kinds, *others]}
    assert statuses - {405, errors.Gone.http_status} == set(ERROR_TEXTS) - {502}  # a relay's
