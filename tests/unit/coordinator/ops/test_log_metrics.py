"""Metrics that nodes send: every form is understood, and what cannot be stored is refused."""

import pytest
from flask import Flask

from noodle.errors import InvalidRequest
from services.coordinator.ops.log_metrics import MAXIMUM_ENTRIES, MetricsEntry, log_metrics_routes, parse_metrics

NOW = 1_700_000_000.0


def entry(node_id, metrics, entry_id=""):
    return MetricsEntry(entry_id=entry_id, received_at_seconds=NOW, node_id=node_id, metrics=metrics)


def client_of(path):
    app = Flask("test")
    app.register_blueprint(log_metrics_routes(path, lambda: None))
    return app.test_client()


def test_the_node_and_its_numbers_are_found_in_every_form():
    pairs = {"tokens_per_second": 3.5}
    for body, node in (
        (b'{"node_id": "pc", "metrics": {"tokens_per_second": 3.5}}', "pc"),
        (b'{"node": "pc", "tokens_per_second": 3.5}', "pc"),
        (b'{"machine": 7, "tokens_per_second": 3.5}', "7"),
        (b'{"tokens_per_second": 3.5}', "unknown"),
    ):
        assert parse_metrics(body, NOW) == [entry(node, pairs)]
    both = parse_metrics(b'{"node_id": "a", "metrics": {"x": 1}, "at": 5}', NOW)
    assert both == [entry("a", {"metrics": {"x": 1}, "at": 5})]
    named = parse_metrics(b'{"node_id": "a", "entry_id": "one", "metrics": {"x": 1}}', NOW)
    assert named == [entry("a", {"x": 1}, "one")]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"5", b"{}", b"[]", b"[5]", b'"x"', b"[" * 100_000, b'{"a": NaN}', b"\xff", b'{"a": 1, "entry_id": 5}'],
)
def test_what_is_no_metrics_is_refused(body):
    with pytest.raises(InvalidRequest):
        parse_metrics(body, NOW)


def test_an_entry_or_a_list_beyond_the_bounds_is_refused():
    with pytest.raises(InvalidRequest, match="65536"):
        parse_metrics(b'{"node_id": "pc", "text": "' + b"x" * 70_000 + b'"}', NOW)
    with pytest.raises(InvalidRequest, match="1000"):
        parse_metrics(b"[" + b'{"a":1},' * MAXIMUM_ENTRIES + b'{"a":1}]', NOW)


def test_stored_entries_come_back_oldest_first(tmp_path):
    client = client_of(tmp_path / "metrics.jsonl")
    sent = [{"node_id": "pc", "entry_id": str(value), "metrics": {"value": value}} for value in range(3)]
    assert client.post("/log_metrics", json=sent).json == {"success": True, "stored": 3, "already_stored": 0}
    assert client.post("/log_metrics", json=sent[2]).json == {"success": True, "stored": 0, "already_stored": 1}
    entries = client.get("/log_metrics?last=2").json["entries"]
    assert [entry["metrics"]["value"] for entry in entries] == [1, 2]
    assert {entry["node_id"] for entry in entries} == {"pc"}


def test_entries_that_an_older_noodle_wrote_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{"received_at_seconds":5.0,"node_id":"pc","metrics":{"value":%d},"entry_id":"%s"}\n'
    path.with_name("metrics.jsonl.1").write_text(line % (1, "a"))
    path.write_text(line % (2, "b") + line % (3, ""))
    client = client_of(path)
    assert [entry["metrics"]["value"] for entry in client.get("/log_metrics").json["entries"]] == [1, 2, 3]
    again = {"node_id": "pc", "entry_id": "a", "metrics": {"value": 1}}
    assert client.post("/log_metrics", json=again).json["already_stored"] == 1


def test_a_file_that_cannot_be_written_is_answered_503_with_the_variable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    answer = client_of(tmp_path / "file" / "metrics.jsonl").post("/log_metrics", json={"value": 1})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "30"
    assert answer.json["success"] is False
    assert "NOODLE_METRICS_FILE" in answer.json["error"]["message"]
