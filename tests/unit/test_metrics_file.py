"""Metrics that nodes send: kept whole, bounded, read back after crashes."""

import pytest

from noodle.errors import InvalidRequest, NotReady
from services.coordinator import metrics_file
from services.coordinator.metrics_file import MAXIMUM_ENTRIES, MetricsFile, parse_metrics


def values(entries):
    return [entry.metrics["value"] for entry in entries]


def test_the_node_and_its_numbers_are_found_in_every_form():
    pairs = {"tokens_per_second": 3.5}
    for body, node in (
        (b'{"node_id": "pc", "metrics": {"tokens_per_second": 3.5}}', "pc"),
        (b'{"node": "pc", "tokens_per_second": 3.5}', "pc"),
        (b'{"machine": 7, "tokens_per_second": 3.5}', "7"),
        (b'{"tokens_per_second": 3.5}', "unknown"),
    ):
        assert parse_metrics(body) == [(node, pairs)]
    assert parse_metrics(b'{"node_id": "a", "metrics": {"x": 1}, "at": 5}') == [("a", {"metrics": {"x": 1}, "at": 5})]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"5", b"{}", b"[]", b"[5]", b'"x"', b"[" * 100_000, b'{"a": NaN}', b"\xff"]
)
def test_what_is_no_metrics_is_refused(body):
    with pytest.raises(InvalidRequest):
        parse_metrics(body)


def test_an_entry_or_a_list_beyond_the_bounds_is_refused():
    with pytest.raises(InvalidRequest, match="65536"):
        parse_metrics(b'{"node_id": "pc", "text": "' + b"x" * 70_000 + b'"}')
    with pytest.raises(InvalidRequest, match="1000"):
        parse_metrics(b"[" + b'{"a":1},' * MAXIMUM_ENTRIES + b'{"a":1}]')


def test_what_was_kept_is_read_by_the_next_process(tmp_path):
    path = tmp_path / "state" / "metrics.jsonl"
    for value in range(3):
        assert MetricsFile(path).append([("pc", {"value": value})]) == 1
    assert values(MetricsFile(path).last(10)) == [0, 1, 2]
    assert values(MetricsFile(path).last(2)) == [1, 2]


def test_the_files_are_bounded_and_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "METRICS_FILE_BYTES", 10_000)
    path = tmp_path / "metrics.jsonl"
    kept = MetricsFile(path)
    for value in range(1000):
        kept.append([("pc", {"value": value})])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_000
    assert len(list(tmp_path.iterdir())) == 2
    assert values(kept.last(100)) == list(range(900, 1000))  # across both files


def test_a_torn_line_is_left_out_and_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = MetricsFile(path)
    kept.append([("pc", {"value": 1})])
    with path.open("ab") as file:
        file.write(b'{"received_at_seconds": 5, "node_')
    kept.append([("pc", {"value": 2})])
    with path.open("ab") as file:
        file.write(b"\xff\n[]\n\n")
    assert values(kept.last(10)) == [1, 2]


def test_long_files_are_read_from_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "READ_BYTES", 7)
    kept = MetricsFile(tmp_path / "metrics.jsonl")
    kept.append([("pc", {"value": value}) for value in range(50)])
    assert values(kept.last(50)) == list(range(50))


def test_a_place_that_can_not_be_written_is_told_to_the_node(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotReady, match="NOODLE_METRICS_FILE"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").append([("pc", {"value": 1})])
    assert MetricsFile(tmp_path / "nothing.jsonl").last(5) == []
