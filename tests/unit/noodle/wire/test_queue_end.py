"""One end of the queued way over streams in memory: what it reads, what it skips, and how it takes absences."""

import pytest

from noodle.errors import QueueUnavailable, WireError
from noodle.wire.frames import encode_entry
from noodle.wire.messages import KeepAlive, LiveSessions, StepResult
from noodle.wire.queue_end import QueueEnd
from tests.support.network.memory_streams import MemoryStreams
from tests.support.processes.cluster import wait_until

OWN = "own"
ENTRY = LiveSessions(1, 1, ["a session"])
SECONDS = 5


@pytest.fixture
def streams():
    return MemoryStreams()


class Heard:
    """An end with everything it was told."""

    def __init__(self, streams):
        self.taken, self.refused, self.failures = [], [], []
        self.end = QueueEnd(
            streams, OWN, take=self.take, changed=lambda: self.failures.append(self.end.failure),
            refused=self.refused.append,
        )  # fmt: skip
        self.end.start("test")
        wait_until(lambda: not self.end.failure, SECONDS, "the stream is read")

    def take(self, entry):
        if isinstance(entry, StepResult):
            raise WireError("that does not belong here")
        self.taken.append(entry)


@pytest.fixture
def heard(streams):
    made = Heard(streams)
    yield made
    made.end.close()


def test_only_what_is_newer_than_its_own_start_is_read(streams):
    streams.append(OWN, encode_entry(LiveSessions(1, 1, ["of before"])))
    heard = Heard(streams)
    streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: heard.taken, SECONDS, "an entry")
    assert heard.taken == [ENTRY]
    heard.end.close()


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"hello", encode_entry(KeepAlive())[:-1], encode_entry(StepResult(1, 1, 1, [], [], []))]
)
def test_junk_is_counted_and_what_comes_after_it_is_taken(streams, heard, junk):
    streams.append(OWN, junk)
    streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: heard.taken, SECONDS, "the entry after it")
    assert heard.taken == [ENTRY]
    assert heard.refused == ["junk"]


def test_junk_is_logged_once(streams, heard, caplog):
    for _ in range(20):
        streams.append(OWN, b"\xc1")
    wait_until(lambda: len(heard.refused) == 20, SECONDS, "all of it")
    assert len([record for record in caplog.records if "skipping an entry" in record.message]) == 1


@pytest.mark.parametrize("losing_all", [False, True])
def test_it_reads_on_when_the_queue_was_away_even_if_that_lost_everything(streams, heard, losing_all):
    streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: heard.taken, SECONDS, "the first entry")
    streams.go_away(losing_all=losing_all)
    wait_until(lambda: heard.end.failure, SECONDS, "the absence is noticed")
    with pytest.raises(QueueUnavailable):
        heard.end.write("another", ENTRY)
    streams.come_back()
    wait_until(lambda: not heard.end.failure, SECONDS, "the return is noticed")
    streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: heard.taken == [ENTRY, ENTRY], SECONDS, "the second entry")
    assert [bool(failure) for failure in heard.failures[-2:]] == [True, False]


def test_a_stream_that_was_lost_unnoticed_is_read_from_its_new_beginning(streams, heard):
    for _ in range(3):
        streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: len(heard.taken) == 3, SECONDS, "the entries of before")
    streams._entries.clear()
    streams._number = 0
    wait_until(lambda: heard.end._position == "0-0", SECONDS, "the loss is noticed")
    streams.append(OWN, encode_entry(ENTRY))
    wait_until(lambda: len(heard.taken) == 4, SECONDS, "the entry after it")


def test_a_full_queue_is_said_with_its_cure_and_tried_again_by_itself(streams, heard):
    streams.is_full = True
    with pytest.raises(QueueUnavailable, match="maxmemory"):
        heard.end.write("another", ENTRY)
    assert "maxmemory" in heard.end.failure
    streams.is_full = False
    with pytest.raises(QueueUnavailable):  # at once again: the next try is a second later
        heard.end.write("another", ENTRY)
    wait_until(lambda: not heard.end.failure, SECONDS, "it can be written again")
    heard.end.write("another", ENTRY)
