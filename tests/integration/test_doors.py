"""What strangers and clients that do not behave can do to running services: nothing that others notice."""

import contextlib
import http.client
import json
import socket
import time

import pytest

from noodle.connection import SEND_SECONDS
from noodle.doors import HEAD_SECONDS, LINGER_SECONDS, SLOW_BODIES
from services.coordinator.answer import CLIENT_LOOK_SECONDS
from tests.support.cluster import request, running_cluster, wait_until
from tests.support.strangers import (
    HALF_HEAD,
    KINDS,
    SERVED_AND_STAYING,
    UNSENT_BODY,
    connect,
    file_count,
    final_answer,
    health_seconds,
    post,
    read_to_end,
    strangers,
    thread_count,
)
from tests.tiny_model import tiny_llama_folder

pytestmark = pytest.mark.timeout(300)

KEY = "key-of-the-test"
BEARER = f"Authorization: Bearer {KEY}"
HEALTH_SECONDS = 1.0
SERVICES = {"coordinator": 240, "planner": 40, "stage-0": 40}  # more strangers than each has threads


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """Two stages behind an API key, with room for answers longer than any socket's buffer."""
    folder = tmp_path_factory.mktemp("doors")
    tiny_llama_folder(folder / "tiny", max_position_embeddings=8192)
    with running_cluster(folder / "state", folder / "tiny", 2, NOODLE_API_KEY=KEY) as running:
        yield running


def port_of(cluster, service):
    return {"coordinator": cluster.port, "planner": cluster.port + 1, "stage-0": cluster.stage_ports[0]}[service]


def generation(new_tokens, **parameters):
    return {"inputs": "abc", "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True, **parameters}}


def ask(cluster, new_tokens):
    status, answer = cluster.post("/generate", generation(new_tokens), Authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return answer["details"]["generated_tokens"]


def holds_rows(cluster):
    return wait_until(cluster.kv_bytes_held, 30, "rows are held")


def frees_rows(cluster, seconds):
    wait_until(lambda: not cluster.kv_bytes_held(), seconds, "no rows are held")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", KINDS, ids=["silent", "half a head", "body unsent", "served and staying"])
def test_strangers_who_do_not_finish_hold_nobody_up(locked, service, kind):
    port = port_of(locked, service)
    with strangers([port], SERVICES[service], (kind,)):
        assert health_seconds(port, locked.token) < HEALTH_SECONDS
        assert health_seconds(port) < HEALTH_SECONDS
    assert ask(locked, 3) == 3


def test_two_hundred_strangers_at_every_door_stop_no_generation_and_leave_nothing(locked):
    ports = [port_of(locked, service) for service in SERVICES]
    workers = [locked.worker_pid(service) for service in SERVICES]
    for port in ports:  # what a few requests at once leave: a pool's threads do not end
        with strangers([port], 8, (SERVED_AND_STAYING,)) as few:
            assert all(read_to_end(connection) for connection in few)
    frees_rows(locked, 15)
    before = [(thread_count(pid), file_count(pid)) for pid in workers]
    with connect(locked.port, post("/generate_stream", generation(1000), BEARER, "Connection: close")) as stream:
        stream.recv(1)
        with strangers(ports, 200):
            for port in ports:
                assert health_seconds(port, locked.token) < HEALTH_SECONDS
            assert ask(locked, 20) == 20
            assert [thread_count(pid) <= old + 8 for pid, (old, _) in zip(workers, before, strict=True)] == [True] * 3
            assert b'"index":1000' in read_to_end(stream)
    for pid, (old_threads, old_files) in zip(workers, before, strict=True):
        wait_until(lambda pid=pid, old=old_files: file_count(pid) <= old, 3 * LINGER_SECONDS, "the files are closed")
        assert thread_count(pid) <= old_threads + 8


def test_more_strangers_than_a_service_has_room_for_make_room_for_a_newcomer(locked):
    port = port_of(locked, "planner")
    with strangers([port], 600, (HALF_HEAD,)) as many:  # it has 16 threads and room for 512 beside them
        assert health_seconds(port, locked.token) < HEALTH_SECONDS
        assert many[0].recv(1) == b""  # the longest waiting one went


def test_a_head_that_comes_byte_by_byte_has_one_deadline(locked):
    for service in SERVICES:
        with connect(port_of(locked, service), b"GET /health HTTP/1.1\r\nX-Slow: ") as slow:
            slow.settimeout(0.2)
            started, answer = time.monotonic(), b""
            while not answer:
                with contextlib.suppress(TimeoutError):
                    slow.sendall(b"x")
                    answer = slow.recv(1 << 16)
                assert time.monotonic() - started < 3 * HEAD_SECONDS
            status, fields, body = final_answer(answer)
        assert (status, fields["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "request_too_slow"


def test_a_stranger_gets_one_answer_and_its_body_is_not_waited_for(locked):
    for service, path in (("coordinator", "/generate"), ("stage-0", "/hop"), ("planner", "/plan")):
        with connect(port_of(locked, service), UNSENT_BODY.replace(b"/generate", path.encode())) as stranger:
            started = time.monotonic()
            status, fields, body = final_answer(read_to_end(stranger))
            assert time.monotonic() - started < HEALTH_SECONDS
        assert (status, fields["connection"]) == ((401, "close") if path != "/plan" else (405, "close"))
        assert json.loads(body)["error"]["type"] in ("authentication_error", "invalid_request_error")
    twice = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 2
    with connect(locked.port, twice) as stranger:
        assert read_to_end(stranger).count(b"HTTP/1.1 200") == 1


def test_a_known_client_keeps_its_connection_and_may_send_requests_at_once(locked):
    one = f"GET /health HTTP/1.1\r\nHost: a\r\n{BEARER}\r\n".encode()
    with connect(locked.port, (one + b"\r\n") * 2 + one + b"Connection: close\r\n\r\n") as client:
        assert read_to_end(client).count(b"HTTP/1.1 200") == 3
    connection = http.client.HTTPConnection("127.0.0.1", locked.port)
    with contextlib.closing(connection):
        sockets = set()
        for body in (json.dumps(generation(2)), iter([json.dumps(generation(2)).encode()])):  # the second is chunked
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            connection.request("POST", "/generate", body, headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            sockets.add(connection.sock)
        assert len(sockets) == 1
        assert sockets != {None}


def test_a_known_clients_body_may_come_slowly(locked):
    body = json.dumps(generation(2)).encode()
    raw = post("/generate", body, BEARER, "Connection: close")
    with connect(locked.port, raw[: -len(body)]) as client:
        for start in range(0, len(body), 8):
            client.sendall(body[start : start + 8])
            time.sleep(0.1)  # the slowness is what is tested
        assert final_answer(read_to_end(client))[0] == 200


def test_slow_bodies_have_places_of_their_own(locked):
    announced = post("/generate", b"", BEARER, "Content-Length: 100")
    announced = announced.replace(b"Content-Length: 0\r\n", b"")
    with strangers([locked.port], 240, (announced,)) as slow:
        assert health_seconds(locked.port, locked.token) < HEALTH_SECONDS
        assert ask(locked, 5) == 5
        refused = 0
        for connection in slow:
            connection.settimeout(0.05 if refused else 5)
            with contextlib.suppress(TimeoutError):
                status, fields, _ = final_answer(read_to_end(connection))
                assert (status, fields["retry-after"]) == (429, "5")
                refused += 1
        assert refused == 240 - SLOW_BODIES


def test_a_client_that_does_not_read_its_stream_loses_it_and_its_rows(locked):
    asked = post("/generate_stream", generation(8000, logprobs=True), BEARER)
    with connect(locked.port, asked, receive_buffer_bytes=4096):
        holds_rows(locked)
        frees_rows(locked, 60 + 3 * SEND_SECONDS)  # some tokens fit into the buffers before it is stuck


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X-Endless: " + b"x" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, none\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nExpect: wonders\r\n\r\n", 417),
        (b"GET / HTTP/3.0\r\n\r\n", 400),
    ],
)
def test_what_is_no_http_gets_openais_error_object(locked, raw, status):
    for service in SERVICES:
        with connect(port_of(locked, service), raw) as client:
            got, fields, body = final_answer(read_to_end(client))
        assert (got, fields["content-type"], fields["connection"]) == (status, "application/json", "close")
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-1\r\n\r\n", b"5;\rx=1\r\nabcde\r\n0\r\n\r\n"]
)
def test_a_malformed_chunked_body_is_a_400_and_one_line_in_the_log(locked, chunks):
    log_path = locked.state_dir / "run" / "logs" / "coordinator.log"
    before = log_path.read_text(encoding="utf-8")
    with connect(locked.port, post("/generate", chunks, BEARER, "Transfer-Encoding: chunked")) as client:
        status, fields, body = final_answer(read_to_end(client))
    assert (status, fields["connection"]) == (400, "close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    logged = log_path.read_text(encoding="utf-8")[len(before) :].splitlines()
    assert len(logged) == 1
    assert "POST /generate" in logged[0]


def test_a_body_cut_short_is_a_400(locked):
    announced = post("/generate", b"{}", BEARER).replace(b"Content-Length: 2", b"Content-Length: 200")
    with connect(locked.port, announced) as client:
        client.shutdown(socket.SHUT_WR)
        status, _, body = final_answer(read_to_end(client))
    assert status == 400
    assert "2 of the 200 bytes" in json.loads(body)["error"]["message"]


def test_a_body_over_the_limit_is_told_so_although_it_is_still_being_sent(locked):
    status, answer = request(locked.port, "POST", "/generate", b"x" * (20 << 20), token=KEY)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    too_much = b"%x\r\n" % (9 << 20) + b"x" * (9 << 20) + b"\r\n0\r\n\r\n"
    with connect(locked.port, post("/generate", too_much, BEARER, "Transfer-Encoding: chunked")) as client:
        assert final_answer(read_to_end(client))[0] == 413


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_has_nothing_more_to_send_gets_its_answer(locked, path, version):
    asked = post(path, generation(1000), BEARER, "Connection: close", version=version)
    with connect(locked.port, asked) as client:
        client.shutdown(socket.SHUT_WR)
        status, _, body = final_answer(read_to_end(client))
    assert status == 200
    assert b'"generated_tokens":1000' in body


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_closed_is_not_computed_for(locked, path):
    with connect(locked.port, post(path, generation(8000), BEARER)):
        holds_rows(locked)
    frees_rows(locked, 3 * (2 * CLIENT_LOOK_SECONDS + 2))  # a second look, and the stages say so each second
