"""The recorder, with a queue that goes away and comes back."""

import threading

import msgspec
import pytest

from noodle.errors import QueueUnavailable
from noodle.wire.messages import TokenLogprob
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.request import Request, Token
from tests.support.processes.cluster import wait_until
from tests.support.sequences import a_request


class QueueThatGoesAway:
    """The calls that the recorder makes, in memory; `away` makes each fail, `restart` deletes everything."""

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

    def record_request(self, request_id, record, tokens=()):
        self._there()
        self.records[request_id] = msgspec.json.decode(record, type=Request)
        self.tokens[request_id] = ids_of(tokens)

    def record_tokens(self, batches):
        self._there()
        for name, tokens in batches.items():
            self.tokens[name] += ids_of(tokens)

    def recorded_requests(self):
        return self.found

    def forget_request(self, request_id):
        self._there()
        self.records.pop(request_id, None)
        self.tokens.pop(request_id, None)

    def restart(self):
        self.server += " again"
        self.records.clear()
        self.tokens.clear()


def ids_of(tokens):
    return [msgspec.json.decode(token, type=Token).token_id for token in tokens]


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
    recorder.begin(a_request())
    for token_id in (5, 6, 7):
        recorder.token("a", Token(token_id))
    wait_until(lambda: queue.tokens.get("a") == [5, 6, 7], 5, "the tokens are recorded")
    recorder.end("a", "finished")
    wait_until(lambda: not queue.records, 5, "the record is gone")


def test_a_request_that_cannot_be_recorded_is_refused(recorder, queue):
    queue.away = True
    with pytest.raises(QueueUnavailable):
        recorder.begin(a_request())


def test_everything_is_written_again_after_valkey_was_away(recorder, queue):
    recorder.begin(a_request())
    recorder.begin(a_request("ends meanwhile"))
    recorder.token("a", Token(5))
    wait_until(lambda: queue.tokens.get("a") == [5], 5, "the first token is recorded")
    queue.away = True
    recorder.token("a", Token(6))
    recorder.end("ends meanwhile", "finished")
    wait_until(lambda: recorder._server_id == "", 5, "the recorder noticed")
    queue.restart()
    queue.away = False
    wait_until(lambda: queue.tokens == {"a": [5, 6]}, 5, "all of it is there again")


def test_everything_is_written_again_after_valkey_restarted_unnoticed(recorder, queue):
    recorder.begin(a_request())
    recorder.token("a", Token(5))
    wait_until(lambda: queue.tokens.get("a") == [5], 5, "the first token is recorded")
    queue.restart()
    recorder.token("a", Token(6))
    wait_until(lambda: queue.tokens == {"a": [5, 6]}, 5, "both tokens are there")


def test_a_token_of_an_ended_request_is_ignored(recorder, queue):
    recorder.token("unknown", Token(1))
    recorder.begin(a_request())
    wait_until(lambda: "a" in queue.records, 5, "the request is recorded")
    assert queue.tokens == {"a": []}


def test_a_request_whose_client_may_come_back_is_kept_with_its_outcome(recorder, queue):
    recorder.begin(a_request(resume_seconds=5.0))
    recorder.token("a", Token(5))
    recorder.end("a", "finished")
    wait_until(lambda: queue.records["a"].outcome == "finished", 5, "its end is recorded")
    assert queue.tokens == {"a": [5]}


def test_a_resumed_request_keeps_its_tokens(recorder, queue):
    recorder.resume(a_request(), [Token(4)])
    recorder.token("a", Token(5))
    wait_until(lambda: queue.tokens.get("a") == [4, 5], 5, "both are recorded")


# as noodle 0.1 wrote them
OLD_RECORD = (
    b'{"request_id":"mine-0123456789ab","prompt_token_ids":[5,6,7],"max_new_tokens":9,"temperature":0.5,"top_p":0.9,'
    b'"top_k":4,"seed":11,"stop":["end"],"ignore_eos":true,"client_request_id":"mine","client_name":"alice",'
    b'"priority":-1,"cache_salt":"salt","want_logprob":true,"top_logprobs":2,"score_prompt":false,"goes_on":false,'
    b'"resume_seconds":60.0,"idempotency_key":"key","body_digest":"digest","answer_id":"chatcmpl-1",'
    b'"created_unix_seconds":1795893324,"deadline_unix_seconds":1795893354.5,"outcome":""}'
)
OLD_TOKENS = [b'[4,null,"",[]]', b'[5,-0.5,"",[[5,-0.5],[9,-1.5]]]', b'[2,-0.25,"eos",[]]']


def test_records_of_an_older_version_are_read(queue):
    queue.found = {"mine-0123456789ab": (OLD_RECORD, OLD_TOKENS)}
    ((request, tokens),) = Recorder(queue).recorded()
    assert request == Request(
        request_id="mine-0123456789ab",
        prompt_token_ids=[5, 6, 7],
        max_new_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=11,
        stop=("end",),
        ignore_eos=True,
        client_request_id="mine",
        client_name="alice",
        priority=-1,
        cache_salt="salt",
        want_logprob=True,
        top_logprobs=2,
        continues_prompt=False,
        resume_seconds=60.0,
        idempotency_key="key",
        body_digest="digest",
        answer_id="chatcmpl-1",
        created_unix_seconds=1795893324,
        deadline_unix_seconds=1795893354.5,
    )
    likeliest = (TokenLogprob(5, -0.5), TokenLogprob(9, -1.5))
    assert tokens == [Token(4), Token(5, -0.5, top=likeliest), Token(2, -0.25, "eos")]


@pytest.mark.parametrize(
    ("record", "tokens"),
    [
        (b"not json", []),
        (b"[1]", []),
        (b"{}", []),
        (b'{"request_id":"other","max_new_tokens":9}', []),
        (b'{"request_id":"bad","max_new_tokens":"nine"}', []),
        (b'{"request_id":"bad","max_new_tokens":9}', []),
        (b'{"request_id":"bad","max_new_tokens":9,"prompt_token_ids":[1]}', [b'{"token_id":4}']),
    ],
)
def test_a_record_that_cannot_be_read_is_put_aside_with_one_line(queue, caplog, record, tokens):
    queue.found = {"bad": (record, tokens), "mine-0123456789ab": (OLD_RECORD, [])}
    assert [request.request_id for request, _ in Recorder(queue).recorded()] == ["mine-0123456789ab"]
    assert [line for line in caplog.messages if "the record of request bad cannot be read" in line]
    assert len(caplog.messages) == 1


def test_a_request_is_read_as_it_was_written(recorder, queue):
    request = a_request(seed=-5, stop=("a", "b"), continues_prompt=False, timeout_seconds=5.0)
    recorder.begin(request)
    assert queue.records["a"] == request
