"""Malformed steps and frames over every transport; the stage serves the next step after each."""

import random
import socket

import pytest

from noodle.errors import LinkLost
from noodle.wire.frames import LENGTHS
from noodle.wire.hop_client import PLAN_VERSION_HEADER, ResultsConnection
from noodle.wire.messages import KeepAlive, LiveSessions, SamplingParameters, StepSpan
from tests.support.network.callers import TOKENS, DirectCaller, QueueCaller
from tests.support.processes.cluster import wait_until
from tests.support.processes.stage_rig import running_stages
from tests.support.stages.stage_threads import stage_threads

pytestmark = pytest.mark.timeout(300)
HIDDEN_SIZE = 64
FRAME_LIMIT = 1 << 20
KV_BYTES = 600 << 10  # room for a few sessions


@pytest.fixture(scope="module")
def direct_rig(tiny_folder, tmp_path_factory):
    """Two stage processes of the tiny model without a coordinator: the test plays both ends."""
    folder = tmp_path_factory.mktemp("direct")
    with running_stages(
        folder, tiny_folder, layers=(3, 3), NOODLE_TRANSPORT="direct", NOODLE_KV_BYTES=str(KV_BYTES)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def queue_rig(tiny_folder, tmp_path_factory):
    """The same over the queue, with a real Valkey."""
    folder = tmp_path_factory.mktemp("queue")
    with running_stages(folder, tiny_folder, layers=(3, 3), NOODLE_TRANSPORT="queue") as running:
        yield running


@pytest.fixture(scope="module")
def memory_rig(tiny_folder, tmp_path_factory):
    """The same as threads of this process, over streams in memory."""
    with stage_threads(tmp_path_factory.mktemp("memory"), tiny_folder, layers=(3, 3)) as running:
        yield running


@pytest.fixture(params=["direct", "queue", "memory"])
def caller(request):
    """The coordinator's two ends; after each test the stages must still serve a step."""
    rig = request.getfixturevalue(f"{request.param}_rig")
    kind = DirectCaller if request.param == "direct" else QueueCaller
    yield from serving_afterwards(kind, rig)


@pytest.fixture
def direct_caller(direct_rig):
    yield from serving_afterwards(DirectCaller, direct_rig)


def serving_afterwards(kind, rig):
    with kind(rig) as made:
        yield made
    with kind(rig) as after:
        after.send(TOKENS, session="afterwards")
        assert after.result().spans[0].token_id is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "wrong_dtype"),
        ({"dtype": "object"}, "wrong_dtype"),
        ({"shape": [5]}, "wrong_shape"),
        ({"shape": [4, HIDDEN_SIZE]}, "wrong_shape"),
        ({"body": TOKENS[:-4], "count": 4}, "bad_tensor"),
        ({"body": (1 << 30).to_bytes(4, "little") * 4}, "wrong_token"),
        ({"body": b"\xff" * 16}, "wrong_token"),
        ({"first": 99}, "wrong_position"),
        ({"first": 20}, "position_gap"),
    ],
)
def test_a_wrong_step_is_refused_and_named_in_the_results(caller, changes, reason):
    changes = dict(changes)
    caller.send(changes.pop("body", TOKENS), **changes)
    result = caller.result()
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert result.spans == []
    assert not caller.lost.is_set()


def test_a_step_of_another_plan_or_an_older_coordinator_is_dropped(caller):
    caller.send(TOKENS, plan_version=caller.rig.plan.version + 1)
    caller.send(TOKENS, coordinator_epoch=0)
    caller.send(TOKENS, step_id=7)
    assert caller.result().step_id == 7
    dropped = caller.rig.metric(0, 'noodle_stage_dropped_spans_total{reason="old_plan_or_epoch"}')
    assert dropped >= 2


def test_a_keep_alive_with_a_number_is_answered_at_once_by_one_with_the_same(direct_caller):
    wait_until(lambda: len(direct_caller.round_trips) >= 2, 10, "two round trips")
    assert all(0 < seconds < 0.9 for seconds in direct_caller.round_trips)  # and not with the next keep-alive
    echoes = {message.echo for message in direct_caller.heard if isinstance(message, KeepAlive)}
    assert {0, 1, 2} <= echoes
    assert direct_caller.rig.metric(0, "noodle_hop_round_trip_seconds_count") >= 1  # stage 0 asks stage 1


def test_the_same_step_again_gives_the_same_token(caller):
    caller.send(TOKENS)
    caller.send(TOKENS)
    caller.send(TOKENS[:4], first=4)
    caller.send(TOKENS)
    tokens = [caller.result(number).spans[0].token_id for number in (1, 2, 4)]
    assert len(set(tokens)) == 1


def test_early_spans_are_computed_when_their_gap_closes(caller):
    caller.send(TOKENS[:4], first=4, gap_seconds=20.0, step_id=2)
    caller.send(TOKENS, step_id=1)
    early = {caller.result(number).step_id: caller.result(number).spans[0].token_id for number in (1, 2)}
    with type(caller)(caller.rig) as orderly:
        orderly.send(TOKENS, step_id=1)
        orderly.send(TOKENS[:4], first=4, step_id=2)
        assert {orderly.result(n).step_id: orderly.result(n).spans[0].token_id for n in (1, 2)} == early


def test_a_new_session_epoch_starts_the_session_again(caller):
    caller.send(TOKENS)
    caller.send(TOKENS[:4], first=4)
    caller.send(TOKENS, session_epoch=2)
    caller.send(TOKENS[:4], first=4, session_epoch=1)  # stale: dropped
    caller.send(TOKENS[:4], first=4, session_epoch=2)
    tokens = [caller.result(number).spans[0].token_id for number in (1, 2, 3, 4)]
    assert tokens[:2] == tokens[2:]


def test_sessions_that_are_released_or_no_longer_listed_hold_no_bytes(caller):
    caller.send(TOKENS, session="released")
    caller.send(TOKENS, session="forgotten")
    caller.result(2)
    assert all(state["kv_bytes_held"] > 0 for state in caller.rig.states())
    caller.send_message(LiveSessions(caller.rig.plan.version, caller.epoch, ["forgotten"], ["released"]))
    wait_until(lambda: all(state["sessions"] == 1 for state in caller.rig.states()), 5, "one session is released")

    def all_is_freed():
        caller.send_message(LiveSessions(caller.rig.plan.version, caller.epoch, []))
        return all(state["kv_bytes_held"] == 0 for state in caller.rig.states())

    wait_until(all_is_freed, 10, "the other is freed")


def test_sessions_that_are_not_on_a_list_that_frees_all_others_hold_no_bytes_for_the_next_step(caller):
    for name in ("listed", "ended"):
        caller.send(TOKENS, session=name)
    caller.result(2)
    listed = LiveSessions(caller.rig.plan.version, caller.epoch, ["listed"], is_authoritative=True)
    caller.send_message(listed)
    caller.send(TOKENS[:4], session="listed", first=4)
    assert caller.result(3).spans[0].first_position == 4
    assert [state["sessions"] for state in caller.rig.states()] == [1, 1]


def test_a_session_without_room_is_refused_alone_and_its_room_is_there_when_another_ends(direct_caller):
    """Sessions of a step share its fate only where they must."""
    rows = direct_caller.rig.plan.context_length
    room = 2 * KV_BYTES // direct_caller.rig.states()[0]["kv_bytes_per_token"]  # the same for forwards by hand
    count, sampling = rows - 1, SamplingParameters()
    fits = [StepSpan(f"fits {index}", 1, 0, count, rows, sampling) for index in range(room // rows)]
    direct_caller.send(TOKENS[:4] * count * len(fits), spans=fits, count=count * len(fits))
    assert len(direct_caller.result(1).spans) == len(fits)
    too_many = room - count * len(fits)  # except for the next row
    late = [StepSpan(f"late {index}", 1, 0, too_many, rows, sampling) for index in range(2)]
    goes_on = StepSpan("fits 0", 1, count, 1, rows, sampling)
    direct_caller.send(TOKENS[:4] * (2 * too_many + 1), spans=[goes_on, *late], count=2 * too_many + 1)
    answer = direct_caller.result(2)
    assert [span.session_id for span in answer.spans] == ["fits 0"]
    assert [(refusal.session_id, refusal.reason) for refusal in answer.refusals] == [
        ("late 0", "kv_budget"),
        ("late 1", "kv_budget"),
    ]
    direct_caller.send_message(
        LiveSessions(direct_caller.rig.plan.version, direct_caller.epoch, ["fits 0"], is_authoritative=True)
    )
    direct_caller.send(TOKENS[:4] * 2 * too_many, spans=late, count=2 * too_many)
    assert [span.session_id for span in direct_caller.result(3).spans] == ["late 0", "late 1"]


def test_a_hop_between_stages_that_is_cut_and_opened_in_one_breath_is_told(direct_caller):
    def number():
        chains = [message.chain for message in direct_caller.heard if isinstance(message, KeepAlive) and message.chain]
        return chains[-1][0].losses

    before = number()
    raw_hop(direct_caller.rig, stage=1).close()  # replaces stage 0's, which opens another
    wait_until(lambda: number() > before and direct_caller.chain_is_whole(), 15, "the loss is counted")
    direct_caller.send(TOKENS)
    assert direct_caller.result().spans[0].token_id is not None


def raw_hop(rig, stage=0, token=None, version=None):
    """Return a socket with an open POST /hop."""
    port = int(rig.urls[stage].rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), 10)
    head = (
        f"POST /hop HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token or rig.token}\r\n"
        f"{PLAN_VERSION_HEADER}: {rig.plan.version if version is None else version}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


def chunk(data):
    return b"%x\r\n" % len(data) + data + b"\r\n"


def rest_of(connection):
    """Return what the stage sends until it closes."""
    connection.settimeout(15)
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        return received
    return received


@pytest.mark.parametrize(
    "data",
    [
        LENGTHS.pack(FRAME_LIMIT << 10, 10),
        LENGTHS.pack(3, 50) + b"x" * 50,
        LENGTHS.pack(4 + 4, 4) + b"\xc1\xc1\xc1\xc1",
    ],
)
def test_a_frame_that_is_none_of_ours_is_refused_and_the_stage_stays_up(direct_caller, data):
    with raw_hop(direct_caller.rig) as connection:
        connection.sendall(chunk(data))
        assert b"refused" in rest_of(connection)


def test_a_frame_cut_short_leaves_the_stage_up(direct_caller):
    with raw_hop(direct_caller.rig) as connection:
        connection.sendall(chunk(LENGTHS.pack(1000, 100) + b"x" * 50))


def test_a_hundred_megabytes_of_noise_leave_the_stage_up(direct_caller):
    noise = random.Random(3).randbytes(1 << 20)
    with raw_hop(direct_caller.rig) as connection:
        connection.settimeout(15)
        try:
            for _ in range(100):
                connection.sendall(chunk(noise))
        except OSError:
            return  # the stage has closed the connection, as it should
    raise AssertionError("a hundred megabytes of noise were taken in")


@pytest.mark.parametrize(("token", "version", "status"), [("x" * 20, None, b" 401 "), (None, 99, b" 503 ")])
def test_a_hop_without_the_token_or_for_another_plan_is_not_opened(direct_rig, token, version, status):
    with raw_hop(direct_rig, token=token, version=version) as connection:
        connection.settimeout(15)
        assert status in connection.recv(100)


def test_results_are_only_given_by_the_last_stage_and_to_the_leading_coordinator(direct_caller):
    rig, version, epoch = direct_caller.rig, direct_caller.rig.plan.version, direct_caller.epoch
    for url, of_epoch in ((rig.urls[0], epoch), (rig.urls[1], epoch - 1)):
        direct_caller.send(TOKENS, step_id=3)
        direct_caller.result()
        with pytest.raises(LinkLost, match="409"):
            ResultsConnection(url, rig.token, print, print).open(version, of_epoch)
