"""The store of records: lines are stored whole and once, the oldest go first, damage costs nothing else."""

import pytest

from noodle.errors import InvalidRequest
from services.coordinator.ops import records
from services.coordinator.ops.records import Record, RecordStore

FILE_BYTES = 1 << 20


class Number(Record, frozen=True, kw_only=True):
    value: int


def number(value, entry_id=""):
    return Number(entry_id=entry_id, value=value)


def values(store, count):
    """Oldest first."""
    return [record.value for record in store.newest(Number, count)][::-1]


def test_what_was_stored_is_read_by_the_next_process(tmp_path):
    path = tmp_path / "state" / "numbers.jsonl"
    for value in range(3):
        assert RecordStore(path, FILE_BYTES).append([number(value)]) == 1
    assert values(RecordStore(path, FILE_BYTES), 10) == [0, 1, 2]
    assert values(RecordStore(path, FILE_BYTES), 2) == [1, 2]


def test_the_files_are_bounded_and_the_newest_stay(tmp_path):
    store = RecordStore(tmp_path / "numbers.jsonl", 5_000)
    for value in range(1000):
        store.append([number(value)])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000
    assert len(list(tmp_path.iterdir())) == 2
    assert values(store, 200) == list(range(800, 1000))  # across both files


def test_a_torn_or_too_deep_line_is_left_out_spoils_no_other_and_is_logged_once(tmp_path, caplog):
    path = tmp_path / "numbers.jsonl"
    store = RecordStore(path, FILE_BYTES)
    store.append([number(1)])
    with path.open("ab") as file:
        file.write(b'{"entry_id": "torn", "val')
    store.append([number(2)])
    with path.open("ab") as file:
        file.write(b"\xff\n[]\n\n" + b'{"entry_id": ' + b"[" * 5_000 + b"]" * 5_000 + b"}\n")
    assert values(store, 10) == [1, 2]
    assert caplog.text.count("damaged line") == 1


def test_long_files_are_read_from_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "READ_BYTES", 7)
    store = RecordStore(tmp_path / "numbers.jsonl", FILE_BYTES)
    store.append([number(value) for value in range(50)])
    assert values(store, 50) == list(range(50))


def test_a_record_is_found_among_the_newest(tmp_path):
    store = RecordStore(tmp_path / "numbers.jsonl", FILE_BYTES)
    assert store.find(Number, "a", 10) is None
    store.append([number(value, entry_id) for value, entry_id in enumerate("abc")])
    assert store.find(Number, "b", 2) == number(1, "b")
    assert store.find(Number, "a", 2) is None


def test_a_place_that_cannot_be_written_raises_and_reads_as_empty(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = RecordStore(tmp_path / "file" / "numbers.jsonl", FILE_BYTES)
    with pytest.raises(OSError, match="File exists"):
        store.append([number(1)])
    assert values(store, 5) == []


def test_a_stored_record_is_not_stored_again_also_by_the_next_process(tmp_path):
    path = tmp_path / "numbers.jsonl"
    assert RecordStore(path, FILE_BYTES).append([number(1, "a"), number(2, "b"), number(1, "a")]) == 2
    again = RecordStore(path, FILE_BYTES)
    assert again.append([number(2, "b"), number(3, "c")]) == 1
    assert again.append([number(3, "c")]) == 0
    assert values(again, 10) == [1, 2, 3]


def test_records_without_an_id_are_stored_as_often_as_they_come(tmp_path):
    store = RecordStore(tmp_path / "numbers.jsonl", FILE_BYTES)
    assert store.append([number(1), number(1)]) == 2
    assert store.append([number(1)]) == 1


def test_an_id_is_known_as_long_as_its_record_is_in_a_file(tmp_path):
    path = tmp_path / "numbers.jsonl"
    store = RecordStore(path, 500)
    for value in range(100):
        assert store.append([number(value, f"id-{value}")]) == 1
        for process in (store, RecordStore(path, 500)):
            in_files = values(process, 100)
            assert process.append([number(known, f"id-{known}") for known in in_files]) == 0


def test_after_a_torn_write_what_came_whole_is_known_and_the_rest_is_stored(tmp_path, monkeypatch):
    store = RecordStore(tmp_path / "numbers.jsonl", FILE_BYTES)
    real_fsync = records.os.fsync

    def full(descriptor):
        size = records.os.fstat(descriptor).st_size
        records.os.truncate(descriptor, size - 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.append([number(1, "a"), number(2, "b")])
    monkeypatch.setattr(records.os, "fsync", real_fsync)
    assert store.append([number(1, "a"), number(2, "b")]) == 1
    assert values(store, 10) == [1, 2]


def test_what_is_nested_too_deeply_is_refused_before_it_is_stored():
    deep = []
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        records.encoded({"metrics": deep})
