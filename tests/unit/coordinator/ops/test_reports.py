"""Reports that the coordinator keeps: found again, bounded, locked, and nothing else can be read through them."""

import json

import pytest
from flask import Flask

from noodle.cluster.reports import MAXIMUM_REPORT_BYTES
from noodle.errors import InvalidRequest, NoodleError, NotAuthenticated, NotFound
from noodle.web.service import install_error_handlers
from services.coordinator.ops import reports
from services.coordinator.ops.reports import ReportStore, install_report_routes

HEAD = {"made_at": "2026-01-02T03:04:05+00:00", "machine": "laptop", "model": "m", "headline": "fast"}


@pytest.fixture
def store(tmp_path):
    return ReportStore(tmp_path / "reports")


def client_of(folder, require_client=lambda: None):
    app = Flask("test")
    install_error_handlers(app)
    install_report_routes(app, folder, require_client)
    return app.test_client()


def test_a_report_comes_back_as_it_was_also_after_a_restart(store, tmp_path):
    kept = store.add("bench", {**HEAD, "results": [1.5, None]})
    again = ReportStore(tmp_path / "reports")
    assert json.loads(again.read(kept.id)) == {**HEAD, "results": [1.5, None]}
    assert again.newest_first() == [kept]
    assert (kept.kind, kept.machine, kept.headline) == ("bench", "laptop", "fast")


def test_the_newest_stands_first(store):
    ids = [store.add(kind, HEAD).id for kind in ("bench", "profile", "bench")]
    assert [report.id for report in store.newest_first()] == ids[::-1]


def test_the_oldest_go_when_there_are_too_many(store, monkeypatch):
    monkeypatch.setattr(reports, "MAXIMUM_REPORTS", 3)
    ids = [store.add("bench", HEAD).id for _ in range(5)]
    assert [report.id for report in store.newest_first()] == ids[:1:-1]
    with pytest.raises(NotFound):
        store.read(ids[0])


def test_the_oldest_go_when_there_are_too_many_bytes(store, monkeypatch):
    monkeypatch.setattr(reports, "MAXIMUM_REPORTS_BYTES", 2500)
    ids = [store.add("bench", {**HEAD, "text": "x" * 1000}).id for _ in range(4)]
    assert [report.id for report in store.newest_first()] == ids[:1:-1]


def test_other_files_in_the_folder_are_left_alone_and_not_shown(store, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "MAXIMUM_REPORTS", 1)
    store.add("bench", HEAD)
    other = tmp_path / "reports" / "secret.json"
    other.write_text("{}")
    store.add("bench", HEAD)
    assert other.exists()
    assert len(store.newest_first()) == 1
    for name in ("secret", "../reports/secret", "..", ""):
        with pytest.raises(NotFound):
            store.read(name)


@pytest.mark.parametrize("head", [{"machine": 5}, {"headline": "x" * 201}, {"model": None}, {"made_at": ["x"]}])
def test_a_head_that_is_not_short_texts_is_refused_and_not_kept(store, head):
    with pytest.raises(InvalidRequest):
        store.add("bench", {**HEAD, **head})
    assert store.newest_first() == []


def test_a_cut_file_is_listed_as_not_readable(store, tmp_path):
    kept = store.add("bench", HEAD)
    (tmp_path / "reports" / f"{kept.id}.json").write_text('{"machine": "lap')
    assert [report.headline for report in store.newest_first()] == ["(not readable)"]


def test_a_folder_that_can_not_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoodleError, match="NOODLE_REPORTS_DIR"):
        ReportStore(tmp_path / "file" / "reports").add("bench", HEAD)


def test_nothing_is_made_before_the_first_report(tmp_path):
    client = client_of(tmp_path / "reports")
    assert client.get("/reports").json == {"reports": []}
    assert not (tmp_path / "reports").exists()


def test_the_routes_keep_list_and_give(tmp_path):
    client = client_of(tmp_path)
    answer = client.post("/reports/profile", json=HEAD)
    assert answer.status_code == 201
    assert answer.json["kind"] == "profile"
    assert [report["id"] for report in client.get("/reports").json["reports"]] == [answer.json["id"]]
    assert client.get(f"/reports/{answer.json['id']}").json == HEAD


def test_an_unknown_kind_a_list_and_too_much_are_refused(tmp_path):
    client = client_of(tmp_path)
    assert client.post("/reports/secrets", json=HEAD).status_code == 404
    assert client.post("/reports/bench", json=[1]).status_code == 400
    assert client.post("/reports/bench", data=b"{", content_type="application/json").status_code == 400
    assert client.post("/reports/bench", data=b"{}", content_type="text/plain").status_code == 415
    large = {**HEAD, "text": "x" * MAXIMUM_REPORT_BYTES}
    assert client.post("/reports/bench", json=large).status_code == 413
    assert client.get("/reports").json == {"reports": []}


def test_a_stranger_gets_nothing(tmp_path):
    def refuse():
        raise NotAuthenticated("no key")

    kept = ReportStore(tmp_path).add("bench", HEAD)
    client = client_of(tmp_path, refuse)
    answers = [client.get("/reports"), client.get(f"/reports/{kept.id}"), client.post("/reports/bench", json=HEAD)]
    assert [answer.status_code for answer in answers] == [401, 401, 401]
