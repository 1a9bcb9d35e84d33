"""Reports that the coordinator stores: found again, bounded, locked, and nothing else can be read through them."""

import json

import pytest
from flask import Flask

from noodle.cluster.reports import MAXIMUM_REPORT_BYTES
from noodle.errors import NotAuthenticated
from noodle.web.service import install_error_handlers
from services.coordinator.ops import reports
from services.coordinator.ops.records import RecordStore
from services.coordinator.ops.reports import adopt_report_files, install_report_routes

HEAD = {"made_at": "2026-01-02T03:04:05+00:00", "machine": "laptop", "model": "m", "headline": "fast"}
OLD_ID = "20260102-030405-{:06}-bench-0a1b2c"


def client_of(folder, require_client=lambda: None):
    app = Flask("test")
    install_error_handlers(app)
    install_report_routes(app, folder, require_client)
    return app.test_client()


@pytest.fixture
def client(tmp_path):
    return client_of(tmp_path / "reports")


def add(client, kind="bench", **fields):
    answer = client.post(f"/reports/{kind}", json={**HEAD, **fields})
    assert answer.status_code == 201
    return answer.json


def ids(client):
    return [report["id"] for report in client.get("/reports").json["reports"]]


def test_a_report_comes_back_as_it_was_also_after_a_restart(client, tmp_path):
    kept = add(client, results=[1.5, None])
    again = client_of(tmp_path / "reports")
    assert again.get(f"/reports/{kept['id']}").json == {**HEAD, "results": [1.5, None]}
    assert again.get("/reports").json == {"reports": [kept]}
    assert (kept["kind"], kept["machine"], kept["headline"]) == ("bench", "laptop", "fast")


def test_the_newest_stands_first(client):
    added = [add(client, kind)["id"] for kind in ("bench", "profile", "bench")]
    assert ids(client) == added[::-1]


def test_the_oldest_go_when_there_are_too_many(client, monkeypatch):
    monkeypatch.setattr(reports, "MAXIMUM_REPORTS", 3)
    added = [add(client)["id"] for _ in range(5)]
    assert ids(client) == added[:1:-1]
    assert client.get(f"/reports/{added[0]}").status_code == 404


def test_the_oldest_go_when_there_are_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "REPORTS_FILE_BYTES", 1500)
    client = client_of(tmp_path)
    added = [add(client, text="x" * 1000)["id"] for _ in range(4)]
    assert ids(client) == added[:1:-1]


def test_reports_in_files_of_an_older_noodle_are_read_in_their_order(tmp_path, caplog):
    for number in range(3):
        (tmp_path / f"{OLD_ID.format(number)}.json").write_text(json.dumps({**HEAD, "number": number}, indent=1))
    (tmp_path / f"{OLD_ID.format(3)}.json").write_text('{"machine": "lap')
    for client in (client_of(tmp_path), client_of(tmp_path)):
        assert ids(client) == [OLD_ID.format(number) for number in (2, 1, 0)]
        assert client.get(f"/reports/{OLD_ID.format(1)}").json == {**HEAD, "number": 1}
        assert client.get(f"/reports/{OLD_ID.format(3)}").status_code == 404
    new = add(client)["id"]
    assert ids(client)[0] == new
    assert "damaged and counts as absent" in caplog.text


def test_old_files_that_cannot_be_moved_end_no_start(tmp_path, caplog):
    (tmp_path / f"{OLD_ID.format(1)}.json").write_text("{}")
    (tmp_path / "reports.jsonl").mkdir()
    assert ids(client_of(tmp_path)) == []
    assert "cannot be moved" in caplog.text


def test_other_files_in_the_folder_are_left_alone_and_not_shown(tmp_path):
    other = tmp_path / "secret.json"
    other.write_text("{}")
    client = client_of(tmp_path)
    add(client)
    assert other.exists()
    assert len(ids(client)) == 1
    for name in ("secret", "../reports/secret", "..", "reports.jsonl"):
        assert client.get(f"/reports/{name}").status_code == 404


@pytest.mark.parametrize("head", [{"machine": 5}, {"headline": "x" * 201}, {"model": None}, {"made_at": ["x"]}])
def test_a_head_that_is_not_short_texts_is_refused_and_not_stored(client, head):
    assert client.post("/reports/bench", json={**HEAD, **head}).status_code == 400
    assert ids(client) == []


def test_a_report_that_is_nested_too_deeply_spoils_no_other_and_no_start(client, tmp_path):
    for depth in (900, 960, 983, 1_000, 5_000):
        body = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        sent = client.post("/reports/bench", data=body, content_type="application/json")
        assert sent.status_code in (201, 400), sent.get_data()
    assert client.get("/reports").status_code == 200
    (tmp_path / "bench-20261101-000000-abc.json").write_bytes(b'{"a":' + b"[" * 983 + b"]" * 983 + b"}")
    adopt_report_files(tmp_path, RecordStore(tmp_path / "reports.jsonl", 1 << 20))


def test_a_folder_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    answer = client_of(tmp_path / "file" / "reports").post("/reports/bench", json=HEAD)
    assert answer.status_code == 500
    assert "NOODLE_REPORTS_DIR" in answer.json["error"]["message"]


def test_nothing_is_made_before_the_first_report(client, tmp_path):
    assert client.get("/reports").json == {"reports": []}
    assert not (tmp_path / "reports").exists()


def test_an_unknown_kind_a_list_and_too_much_are_refused(client):
    assert client.post("/reports/secrets", json=HEAD).status_code == 404
    assert client.post("/reports/bench", json=[1]).status_code == 400
    assert client.post("/reports/bench", data=b"{", content_type="application/json").status_code == 400
    assert client.post("/reports/bench", data=b"{}", content_type="text/plain").status_code == 415
    large = {**HEAD, "text": "x" * MAXIMUM_REPORT_BYTES}
    assert client.post("/reports/bench", json=large).status_code == 413
    assert client.get("/reports").json == {"reports": []}


def test_anonymous_requests_are_refused(tmp_path):
    def refuse():
        raise NotAuthenticated("no key")

    kept = add(client_of(tmp_path))
    client = client_of(tmp_path, refuse)
    answers = [client.get("/reports"), client.get(f"/reports/{kept['id']}"), client.post("/reports/bench", json=HEAD)]
    assert [answer.status_code for answer in answers] == [401, 401, 401]
