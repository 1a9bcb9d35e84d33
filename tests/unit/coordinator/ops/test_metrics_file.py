"""Metrics that nodes send: kept whole, bounded, read back after crashes."""

import pytest

from noodle.errors import InvalidRequest, NotReady
from services.coordinator.ops import metrics_file
from services.coordinator.ops.metrics_file import MAXIMUM_ENTRIES, Kept, MetricsFile, SentEntry, parse_metrics


def entry(value, entry_id=""):
    return SentEntry("pc", {"value": value}, entry_id)


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
        assert parse_metrics(body) == [SentEntry(node, pairs)]
    both = parse_metrics(b'{"node_id": "a", "metrics": {"x": 1}, "at": 5}')
    assert both == [SentEntry("a", {"metrics": {"x": 1}, "at": 5})]
    named = parse_metrics(b'{"node_id": "a", "entry_id": "one", "metrics": {"x": 1}}')
    assert named == [SentEntry("a", {"x": 1}, "one")]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"5", b"{}", b"[]", b"[5]", b'"x"', b"[" * 100_000, b'{"a": NaN}', b"\xff", b'{"a": 1, "entry_id": 5}'],
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
        assert MetricsFile(path).append([entry(value)]) == Kept(1, 0)
    assert values(MetricsFile(path).last(10)) == [0, 1, 2]
    assert values(MetricsFile(path).last(2)) == [1, 2]


def test_the_files_are_bounded_and_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "METRICS_FILE_BYTES", 10_000)
    path = tmp_path / "metrics.jsonl"
    kept = MetricsFile(path)
    for value in range(1000):
        kept.append([entry(value)])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_000
    assert len(list(tmp_path.iterdir())) == 2
    assert values(kept.last(100)) == list(range(900, 1000))  # across both files


def test_a_torn_line_is_left_out_and_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = MetricsFile(path)
    kept.append([entry(1)])
    with path.open("ab") as file:
        file.write(b'{"received_at_seconds": 5, "node_')
    kept.append([entry(2)])
    with path.open("ab") as file:
        file.write(b"\xff\n[]\n\n")
    assert values(kept.last(10)) == [1, 2]


def test_long_files_are_read_from_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "READ_BYTES", 7)
    kept = MetricsFile(tmp_path / "metrics.jsonl")
    kept.append([entry(value) for value in range(50)])
    assert values(kept.last(50)) == list(range(50))


def test_a_place_that_can_not_be_written_is_told_to_the_node(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotReady, match="NOODLE_METRICS_FILE"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").append([entry(1)])
    assert MetricsFile(tmp_path / "nothing.jsonl").last(5) == []


def test_an_entry_that_is_kept_is_not_kept_again_also_by_the_next_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert MetricsFile(path).append([entry(1, "a"), entry(2, "b"), entry(1, "a")]) == Kept(2, 1)
    again = MetricsFile(path)
    assert again.append([entry(2, "b"), entry(3, "c")]) == Kept(1, 1)
    assert again.append([entry(3, "c")]) == Kept(0, 1)
    assert values(again.last(10)) == [1, 2, 3]
    assert [kept.entry_id for kept in again.last(10)] == ["a", "b", "c"]


def test_entries_without_an_id_are_kept_as_often_as_they_come(tmp_path):
    kept = MetricsFile(tmp_path / "metrics.jsonl")
    assert kept.append([entry(1), entry(1)]) == Kept(2, 0)
    assert kept.append([entry(1)]) == Kept(1, 0)


def test_an_id_is_known_as_long_as_its_entry_is_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "METRICS_FILE_BYTES", 1_000)
    path = tmp_path / "metrics.jsonl"
    kept = MetricsFile(path)
    for value in range(100):
        assert kept.append([entry(value, f"id-{value}")]) == Kept(1, 0)
        for process in (kept, MetricsFile(path)):
            in_files = values(process.last(100))
            known = {f"id-{number}" for number in in_files}
            assert process.append([entry(number, f"id-{number}") for number in in_files]) == Kept(0, len(known))


def test_after_a_torn_write_what_came_whole_is_known_and_the_rest_is_kept(tmp_path, monkeypatch):
    kept = MetricsFile(tmp_path / "metrics.jsonl")
    real_fsync = metrics_file.os.fsync

    def full(descriptor):
        size = metrics_file.os.fstat(descriptor).st_size
        metrics_file.os.truncate(descriptor, size - 20)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_file.os, "fsync", full)
    with pytest.raises(NotReady, match="No space left"):
        kept.append([entry(1, "a"), entry(2, "b")])
    monkeypatch.setattr(metrics_file.os, "fsync", real_fsync)
    assert kept.append([entry(1, "a"), entry(2, "b")]) == Kept(1, 1)
    assert values(kept.last(10)) == [1, 2]
