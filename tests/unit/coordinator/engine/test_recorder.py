"""Contract of the recorder, over a queue that goes away and comes back."""

import threading

import pytest

from noodle.cluster.valkey import RecordedToken, RequestRecord
from noodle.errors import QueueUnavailable
from services.coordinator.engine.recorder import Recorder
from tests.support.processes.cluster import wait_until


class QueueThatGoesAway:
    """What the recorder asks of WorkQueue, in memory; `away` makes every call fail and `restart` forgets all."""

    def __init__(self):
        self.away = False
        self.server = "first"
        self.records = {}
        self.tokens = {}

    def _there(self):
        if self.away:
            raise QueueUnavailable("away")

    def server_id(self):
        self._there()
        return self.server

    def record_request(self, record, tokens=()):
        self._there()
        self.records[record.request_id] = record
        self.tokens[record.request_id] = [token.token_id for token in tokens]

    def record_tokens(self, batches):
        self._there()
        for name, tokens in batches.items():
            self.tokens[name] += [token.token_id for token in tokens]

    def forget_request(self, request_id):
        self._there()
        self.records.pop(request_id, None)
        self.tokens.pop(request_id, None)

    def restart(self):
        self.server += " again"
        self.records.clear()
        self.tokens.clear()


def a_record(name="a"):
    return RequestRecord(name, [1, 2], 9, 0.0, 1.0, 0, 0, [], False)


@pytest.fixture
def queue():
    return QueueThatGoesAway()


@pytest.fixture
def recorder(queue):
    made = Recorder(queue)
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_tokens_follow_their_request_and_the_end_takes_both_away(recorder, queue):
    recorder.begin(a_record())
    for token_id in (5, 6, 7):
        recorder.token("a", RecordedToken(token_id))
    wait_until(lambda: queue.tokens.get("a") == [5, 6, 7], 5, "the tokens are recorded")
    recorder.end("a", "finished")
    wait_until(lambda: not queue.records, 5, "the record is gone")


def test_a_request_that_can_not_be_recorded_is_refused(recorder, queue):
    queue.away = True
    with pytest.raises(QueueUnavailable):
        recorder.begin(a_record())


def test_what_valkey_lost_while_it_was_away_is_written_again_whole(recorder, queue):
    recorder.begin(a_record())
    recorder.begin(a_record("ends meanwhile"))
    recorder.token("a", RecordedToken(5))
    wait_until(lambda: queue.tokens.get("a") == [5], 5, "the first token is recorded")
    queue.away = True
    recorder.token("a", RecordedToken(6))
    recorder.end("ends meanwhile", "finished")
    wait_until(lambda: recorder._server_id == "", 5, "the recorder noticed")
    queue.restart()
    queue.away = False
    wait_until(lambda: queue.tokens == {"a": [5, 6]}, 5, "all of it is there again")


def test_a_valkey_that_came_back_unnoticed_gets_everything_again(recorder, queue):
    recorder.begin(a_record())
    recorder.token("a", RecordedToken(5))
    wait_until(lambda: queue.tokens.get("a") == [5], 5, "the first token is recorded")
    queue.restart()
    recorder.token("a", RecordedToken(6))
    wait_until(lambda: queue.tokens == {"a": [5, 6]}, 5, "both tokens are there")


def test_a_token_of_a_request_that_has_ended_is_nobodys(recorder, queue):
    recorder.token("unknown", RecordedToken(1))
    recorder.begin(a_record())
    wait_until(lambda: "a" in queue.records, 5, "the request is recorded")
    assert queue.tokens == {"a": []}


def test_a_request_whose_client_may_come_back_is_kept_with_how_it_ended(recorder, queue):
    recorder.begin(RequestRecord("a", [1, 2], 9, 0.0, 1.0, 0, 0, [], False, resume_seconds=5.0))
    recorder.token("a", RecordedToken(5))
    recorder.end("a", "finished")
    wait_until(lambda: queue.records["a"].outcome == "finished", 5, "its end is recorded")
    assert queue.tokens == {"a": [5]}


def test_a_request_that_goes_on_from_another_coordinator_keeps_its_tokens(recorder, queue):
    recorder.go_on(a_record(), [RecordedToken(4)])
    recorder.token("a", RecordedToken(5))
    wait_until(lambda: queue.tokens.get("a") == [4, 5], 5, "both are recorded")
