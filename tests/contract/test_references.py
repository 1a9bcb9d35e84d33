"""References between two stages: what the keeping stage serves, and what the fetching stage accepts."""

import contextlib
import http.client
import http.server
import threading

import numpy as np
import pytest

from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from noodle.wire.frames import body_digest, decode_entry, encode_entry
from noodle.wire.messages import ActivationRef, LiveSessions, StepResult
from services.stage.transport.outbox import Outbox
from services.stage.transport.queued import CONFIRMATION, FETCH_TRIES
from tests.support.network.callers import TOKENS, QueueCaller
from tests.support.network.relay import Relay
from tests.support.processes.cluster import request, wait_until
from tests.support.processes.stage_rig import running_stages
from tests.support.stages.stage_threads import stage_threads

pytestmark = pytest.mark.timeout(300)
HIDDEN_SIZE = 64
STRANGER = "x" * 32
BODY = np.linspace(-1, 1, 4 * HIDDEN_SIZE, dtype=np.float32).tobytes()


# the keeping stage; the test plays the fetching stage


@pytest.fixture(scope="module")
def keeper(tiny_folder, tmp_path_factory):
    """Stage 0 of two, alone."""
    folder = tmp_path_factory.mktemp("keeper")
    with running_stages(folder, tiny_folder, (3, 3), absent=(1,), NOODLE_TRANSPORT="queue") as rig:
        yield rig


class OneLinked(QueueCaller):
    """A caller of a pipeline with only one stage present."""

    def __init__(self, rig, stage):
        super().__init__(rig)
        self.stage = stage

    def all_are_linked(self):
        state = self.rig.work_queue.stage_states().get(self.stage)
        return state is not None and state.link is not None and state.link.next_link_up


@pytest.fixture
def kept(keeper):
    """Return a reference that stage 0 has just made."""
    seen = keeper.work_queue.newest(hop_stream(1))
    with OneLinked(keeper, 0) as caller:
        caller.send(TOKENS)
        entries = wait_until(lambda: keeper.work_queue.read(hop_stream(1), seen, 0.1), 15, "a reference")
    reference = decode_entry(entries[-1][1])
    assert isinstance(reference, ActivationRef)
    return reference


def port_of(url):
    return int(url.rsplit(":", 1)[1])


def fetch(port, activation_id, token, *, confirm=True, chunked=True):
    """Fetch as a stage does, with or without the final confirmation."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest("GET", f"/activations/{activation_id}")
        connection.putheader("Authorization", f"Bearer {token}")
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        if confirm and chunked and connection.sock is not None:  # an error closes the connection
            connection.sock.sendall(CONFIRMATION)
        return answer.status, body
    finally:
        connection.close()


def outbox_bytes(port, token):
    return request(port, "GET", "/health", token=token)[1]["state"]["outbox_bytes"]


def test_a_reference_says_what_it_leads_to_and_is_fetched_once(keeper, kept):
    port = port_of(kept.url)
    assert kept.url == keeper.plan.stages[0].url
    assert (kept.step.dtype, kept.step.shape) == ("float32", [4, HIDDEN_SIZE])
    assert kept.byte_count == 4 * HIDDEN_SIZE * 4
    status, body = fetch(port, kept.activation_id, keeper.token)
    assert (status, len(body), body_digest(body)) == (200, kept.byte_count, kept.digest)

    def again():
        status, body = fetch(port, kept.activation_id, keeper.token)
        return status == 410 and b"already fetched" in body

    wait_until(again, 5, "it is gone")


def test_a_plain_fetch_counts_when_it_was_sent_whole(keeper, kept):
    port = port_of(kept.url)
    assert fetch(port, kept.activation_id, keeper.token, chunked=False)[0] == 200
    # the stage notes the end a moment after the last byte arrives
    wait_until(lambda: fetch(port, kept.activation_id, keeper.token, chunked=False)[0] == 410, 5, "it is gone")
    assert b"already fetched" in fetch(port, kept.activation_id, keeper.token, chunked=False)[1]


def test_an_anonymous_client_gets_nothing_and_takes_nothing(keeper, kept):
    port = port_of(kept.url)
    assert fetch(port, kept.activation_id, STRANGER, chunked=False)[0] == 401
    assert fetch(port, "0" * 32, STRANGER, chunked=False)[0] == 401
    assert fetch(port, "0" * 32, keeper.token)[0] == 404
    assert fetch(port, "..%2F..%2Fhealth", keeper.token, chunked=False)[0] == 404
    assert fetch(port, kept.activation_id, keeper.token)[0] == 200


def test_a_transfer_that_was_cut_or_not_confirmed_can_be_made_again(keeper, kept):
    port = port_of(kept.url)
    with Relay(port) as relay:
        relay.cut_after_bytes = 400
        with pytest.raises((OSError, http.client.HTTPException)):
            fetch(relay.port, kept.activation_id, keeper.token)
        relay.cut_after_bytes = None
        assert len(fetch(relay.port, kept.activation_id, keeper.token, confirm=False)[1]) == kept.byte_count
    assert len(fetch(port, kept.activation_id, keeper.token)[1]) == kept.byte_count
    wait_until(lambda: fetch(port, kept.activation_id, keeper.token)[0] == 410, 5, "it is gone")


def test_what_expired_is_told_from_what_was_fetched(tiny_folder, tmp_path):
    with stage_threads(tmp_path, tiny_folder, layers=(3, 3)) as rig:
        rig.stages[0].outbox = Outbox(activation_seconds=0.01)
        name = rig.stages[0].outbox.put(BODY)
        wait_until(lambda: rig.stages[0].outbox.held_bytes == 0, 5, "it expires")
        status, body = fetch(port_of(rig.urls[0]), name, rig.token, chunked=False)
        assert status == 410
        assert b"expired" in body


# the fetching stage; the test plays the keeping stage


@pytest.fixture(scope="module")
def fetcher(tiny_folder, tmp_path_factory):
    """Stage 1 of two, alone."""
    folder = tmp_path_factory.mktemp("fetcher")
    with running_stages(folder, tiny_folder, (3, 3), absent=(0,), NOODLE_TRANSPORT="queue") as rig:
        yield rig


class Bytes(http.server.BaseHTTPRequestHandler):
    """The server of stage 0, which answers as the test sets it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        status, announced, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def door(rig, status=200, announced=None, body=BODY):
    """Serve at the address that the plan has for stage 0."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port_of(rig.plan.stages[0].url)), Bytes)
    server.asked, server.answer = [], (status, len(body) if announced is None else announced, body)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def stage_1(fetcher):
    """Sends references to stage 1; after each test a valid one must still be computed."""
    with OneLinked(fetcher, 1) as caller:
        yield caller
    with OneLinked(fetcher, 1) as caller, door(fetcher):
        refer(caller)
        assert caller.result().spans[0].token_id is not None


def refer(caller, **changes):
    """Put a reference on stage 1's stream."""
    step = caller.step(TOKENS, dtype="float32", shape=[4, HIDDEN_SIZE])
    fields = {"step": step, "url": caller.rig.plan.stages[0].url, "activation_id": "ab" * 16,
              "byte_count": len(BODY), "digest": body_digest(BODY)}  # fmt: skip
    caller.rig.work_queue.append(hop_stream(1), encode_entry(ActivationRef(**{**fields, **changes})))


def refusals(rig, reason):
    _, text = request(port_of(rig.urls[1]), "GET", "/metrics", token=rig.token)
    name = f'noodle_queue_refused_entries_total{{reason="{reason}"}}'
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.decode().splitlines() if line.startswith(name))


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        ({"body": BODY[:-1] + b"!"}, "wrong_digest", 1),
        ({"body": BODY[:-4]}, "wrong_length", 1),
        ({"body": BODY + BODY}, "wrong_length", 1),
        ({"status": 404, "body": b"{}"}, "not_fetched", 1),
        ({"status": 410, "body": b"{}"}, "not_fetched", 1),
        ({"announced": len(BODY), "body": BODY[:100]}, "not_fetched", FETCH_TRIES),
        (None, "not_fetched", None),
    ],
)
def test_bytes_that_are_not_those_of_the_reference_refuse_the_step(stage_1, answer, reason, tries):
    before = refusals(stage_1.rig, reason)
    with door(stage_1.rig, **answer) if answer is not None else contextlib.nullcontext() as server:
        refer(stage_1)
        result = stage_1.result()
    assert [refusal.reason for refusal in result.refusals] == ["activations_lost"]
    assert result.spans == []
    assert refusals(stage_1.rig, reason) == before + 1
    if server is not None:
        assert 0 < len(server.asked) <= tries  # one may be lost on an earlier connection


@pytest.mark.parametrize("changes", [{"byte_count": 1 << 30}, {"byte_count": len(BODY) - 4}, {"byte_count": 1}])
def test_a_length_that_is_not_the_shapes_is_refused_before_anything_is_fetched(stage_1, changes):
    with door(stage_1.rig) as server:
        refer(stage_1, **changes)
        assert [refusal.reason for refusal in stage_1.result().refusals] == ["activations_lost"]
    assert server.asked == []


@pytest.mark.parametrize("shape", [[8193, HIDDEN_SIZE], [4, HIDDEN_SIZE * 2], [4], [4 * HIDDEN_SIZE]])
def test_a_shape_that_the_plan_does_not_allow_is_refused_before_anything_is_fetched(stage_1, shape):
    size = int(np.prod(shape)) * 4
    with door(stage_1.rig) as server:
        refer(stage_1, step=stage_1.step(TOKENS, dtype="float32", shape=shape), byte_count=size)
        assert [refusal.reason for refusal in stage_1.result().refusals] == ["activations_lost"]
    assert server.asked == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://169.254.169.254:80", "file:///etc/passwd", ""])
def test_a_url_that_is_not_the_plans_is_never_opened_and_ends_no_session(stage_1, url):
    before = refusals(stage_1.rig, "wrong_url")
    refer(stage_1, url=url)
    wait_until(lambda: refusals(stage_1.rig, "wrong_url") == before + 1, 10, "it is counted")
    assert not [message for message in stage_1.heard if isinstance(message, StepResult)]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xc1" * 1000,
        b"\x00" * (5 << 20),
        encode_entry(StepResult(1, 1, 1, [], [], [])),
        encode_entry(LiveSessions(1, 1, ["a"])).replace(b"live", b"evil"),
    ],
)
def test_junk_on_the_stream_is_counted_and_skipped(stage_1, junk):
    before = refusals(stage_1.rig, "junk") + refusals(stage_1.rig, "too_large")
    stage_1.rig.work_queue.append(hop_stream(1), junk)
    wait_until(
        lambda: refusals(stage_1.rig, "junk") + refusals(stage_1.rig, "too_large") == before + 1, 10, "it is counted"
    )


def test_references_of_another_plan_or_an_older_coordinator_are_dropped_unfetched(stage_1):
    with door(stage_1.rig) as server:
        refer(stage_1)
        stage_1.result()
        refer(stage_1, step=stage_1.step(dtype="float32", shape=[4, HIDDEN_SIZE], plan_version=7))
        refer(stage_1, step=stage_1.step(dtype="float32", shape=[4, HIDDEN_SIZE], coordinator_epoch=0))
        refer(stage_1)
        stage_1.result(2)
    assert len(server.asked) == 2


def test_no_activations_are_in_the_streams(keeper, kept):
    """The entries left in Valkey after a step are too small for hidden states."""
    for stream in (hop_stream(0), hop_stream(1), RESULTS_STREAM):
        for _, data in keeper.work_queue.read(stream, "0-0", 0.01):
            assert len(data) < kept.byte_count
