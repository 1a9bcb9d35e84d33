"""Anonymous and misbehaving clients must not affect others."""

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from noodle.web.connection import SEND_SECONDS
from noodle.web.server import HEAD_SECONDS, LINGER_SECONDS, SLOW_BODIES
from services.coordinator.text.answer import CLIENT_LOOK_SECONDS
from tests.support.clients.raw_sockets import (
    HALF_HEAD,
    KINDS,
    UNSENT_BODY,
    anonymous_clients,
    connect,
    file_count,
    final_answer,
    health_seconds,
    post,
    read_to_end,
    thread_count,
)
from tests.support.models.tiny_model import tiny_llama_folder
from tests.support.processes.cluster import request, running_cluster, wait_until

pytestmark = pytest.mark.timeout(300)

KEY = "key-of-the-test"
BEARER = f"Authorization: Bearer {KEY}"
MODEL = "a-model-whose-name-makes-every-event-long-" + "x" * 200  # so that few events fill a socket buffer
HEALTH_SECONDS = 1.0
SERVICES = {"coordinator": 240, "planner": 40, "stage-0": 40}  # more connections than each service has threads
POOL_THREADS = {"coordinator": 224, "planner": 16, "stage-0": 32}
OWN_THREADS = 16
OWN_FILES = 16  # connections that a service opens for itself and keeps; 200 leaked connections would exceed it


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """Two stages behind an API key, with room for answers longer than any socket buffer."""
    folder = tmp_path_factory.mktemp("doors")
    tiny_llama_folder(folder / MODEL, max_position_embeddings=8192)
    with running_cluster(folder / "state", folder / MODEL, 2, NOODLE_API_KEY=KEY) as running:
        yield running


def port_of(cluster, service):
    return {"coordinator": cluster.port, "planner": cluster.port + 1, "stage-0": cluster.stage_ports[0]}[service]


def generation(new_tokens, **parameters):
    return {"inputs": "abc", "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True, **parameters}}


def ask(cluster, new_tokens):
    status, answer = cluster.post("/generate", generation(new_tokens), Authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return answer["details"]["generated_tokens"]


def coordinator_log(cluster):
    return (cluster.state_dir / "run" / "logs" / "coordinator.log").read_text(encoding="utf-8")


def holds_rows(cluster):
    return wait_until(cluster.kv_bytes_held, 30, "rows are held")


def frees_rows(cluster, seconds):
    wait_until(lambda: not cluster.kv_bytes_held(), seconds, "no rows are held")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", KINDS, ids=["silent", "half a head", "body unsent", "served and staying"])
def test_anonymous_clients_who_do_not_finish_hold_nobody_up(locked, service, kind):
    port = port_of(locked, service)
    with anonymous_clients([port], SERVICES[service], (kind,)):
        assert health_seconds(port, locked.token) < HEALTH_SECONDS
        assert health_seconds(port) < HEALTH_SECONDS
    assert ask(locked, 3) == 3


def test_anonymous_clients_without_a_whole_head_get_no_thread(locked):
    workers = [locked.worker_pid(service) for service in SERVICES]
    ports = [port_of(locked, service) for service in SERVICES]
    assert all(health_seconds(port, locked.token) < HEALTH_SECONDS for port in ports)
    before = [thread_count(pid) for pid in workers]
    with anonymous_clients(ports, 200, (b"", HALF_HEAD)):
        assert all(health_seconds(port, locked.token) < HEALTH_SECONDS for port in ports)
        grown = [thread_count(pid) - old for pid, old in zip(workers, before, strict=True)]
    assert max(grown) <= 3, grown  # for /health, and a stage's own


def test_two_hundred_anonymous_clients_at_every_door_stop_no_generation_and_leave_nothing(locked):
    ports = [port_of(locked, service) for service in SERVICES]
    workers = {service: locked.worker_pid(service) for service in SERVICES}
    assert ask(locked, 20) == 20
    files_before = {service: file_count(pid) for service, pid in workers.items()}
    with connect(locked.port, post("/generate_stream", generation(300), BEARER, "Connection: close")) as stream:
        stream.recv(1)
        with anonymous_clients(ports, 200):
            for port in ports:
                assert health_seconds(port, locked.token) < HEALTH_SECONDS
            assert ask(locked, 20) == 20
            assert b'"index":300' in read_to_end(stream)
    for service, pid in workers.items():
        most = files_before[service] + OWN_FILES
        wait_until(
            lambda pid=pid, most=most: file_count(pid) <= most, 3 * LINGER_SECONDS, f"{service} closed its files"
        )
        assert thread_count(pid) <= POOL_THREADS[service] + OWN_THREADS


def test_more_anonymous_clients_than_a_service_has_room_for_make_room_for_a_newcomer(locked):
    port = port_of(locked, "planner")
    with anonymous_clients([port], 600, (HALF_HEAD,)) as many:  # it has 16 threads and room for 512 beside them
        assert health_seconds(port, locked.token) < HEALTH_SECONDS
        assert many[0].recv(1) == b""  # the longest-waiting one was closed


def test_a_head_that_comes_byte_by_byte_has_one_deadline(locked):
    begun = b"GET /health HTTP/1.1\r\nX-Slow: "
    started = time.monotonic()
    with anonymous_clients([port_of(locked, service) for service in SERVICES], 1, (begun,)) as slow:
        answered = set()
        while len(answered) < len(slow):
            for connection in answered.symmetric_difference(slow):
                connection.sendall(b"x")
            answered |= set(select.select(list(answered.symmetric_difference(slow)), [], [], 0.2)[0])
            assert time.monotonic() - started < 3 * HEAD_SECONDS
        for connection in slow:
            status, fields, body = final_answer(read_to_end(connection))
            assert (status, fields["connection"]) == (408, "close")
            assert json.loads(body)["error"]["code"] == "request_too_slow"


def test_an_anonymous_client_gets_one_answer_and_its_body_is_not_waited_for(locked):
    for service, path in (("coordinator", "/generate"), ("stage-0", "/hop"), ("planner", "/plan")):
        with connect(port_of(locked, service), UNSENT_BODY.replace(b"/generate", path.encode())) as client:
            started = time.monotonic()
            status, fields, body = final_answer(read_to_end(client))
            assert time.monotonic() - started < HEALTH_SECONDS
        assert (status, fields["connection"]) == ((401, "close") if path != "/plan" else (405, "close"))
        assert json.loads(body)["error"]["type"] in ("authentication_error", "invalid_request_error")
    twice = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 2
    with connect(locked.port, twice) as client:
        assert read_to_end(client).count(b"HTTP/1.1 200") == 1


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
            time.sleep(0.1)  # the slowness under test
        assert final_answer(read_to_end(client))[0] == 200


def test_slow_bodies_have_places_of_their_own(locked):
    announced = post("/generate", b"", BEARER, "Content-Length: 100").replace(b"Content-Length: 0\r\n", b"")
    with anonymous_clients([locked.port], 240, (announced,)) as slow:
        assert health_seconds(locked.port, locked.token) < HEALTH_SECONDS
        assert ask(locked, 5) == 5
        refused = wait_until(lambda: len(answered := readable(slow)) == 240 - SLOW_BODIES and answered, 5, "refused")
        for connection in refused:
            status, fields, _ = final_answer(read_to_end(connection))
            assert (status, fields["retry-after"]) == (429, "5")


def readable(connections):
    return select.select(connections, [], [], 0)[0]


def test_a_client_that_does_not_read_its_stream_loses_it_and_its_rows(locked):
    asked = {"model": MODEL, "prompt": "abc", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with connect(locked.port, post("/v1/completions", asked, BEARER), receive_buffer_bytes=4096):
        holds_rows(locked)
        frees_rows(locked, 60 + 3 * SEND_SECONDS)  # some tokens fit into the buffers before it is stuck
    assert f"it read nothing for {SEND_SECONDS:.0f} s" in coordinator_log(locked)


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
    before = coordinator_log(locked)
    with connect(locked.port, post("/generate", chunks, BEARER, "Transfer-Encoding: chunked")) as client:
        status, fields, body = final_answer(read_to_end(client))
    assert (status, fields["connection"]) == (400, "close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    logged = coordinator_log(locked)[len(before) :].splitlines()
    assert len([line for line in logged if "POST /generate" in line]) == 1
    assert not any("Traceback" in line for line in logged)


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


@pytest.mark.parametrize(
    ("path", "version", "new_tokens"),
    [
        ("/generate", "1.1", 400),  # long enough for more than one check of the client
        ("/generate", "1.0", 50),
        ("/generate_stream", "1.1", 50),
        ("/generate_stream", "1.0", 50),
    ],
)
def test_a_client_that_has_nothing_more_to_send_gets_its_answer(locked, path, version, new_tokens):
    asked = post(path, generation(new_tokens), BEARER, "Connection: close", version=version)
    with connect(locked.port, asked) as client:
        client.shutdown(socket.SHUT_WR)
        status, _, body = final_answer(read_to_end(client))
    assert status == 200
    assert f'"generated_tokens":{new_tokens}'.encode() in body


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_closed_is_not_computed_for(locked, path):
    with connect(locked.port, post(path, generation(8000), BEARER)):
        holds_rows(locked)
    frees_rows(locked, 3 * (2 * CLIENT_LOOK_SECONDS + 2))  # a second check, and the stages report each second


def test_anonymous_clients_do_not_hold_up_a_stop(locked):
    port, master, worker = port_of(locked, "planner"), locked.service_pid("planner"), locked.worker_pid("planner")
    with anonymous_clients([port], 200):
        assert health_seconds(port) < HEALTH_SECONDS
        os.kill(master, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{worker}").exists(), 3 * LINGER_SECONDS, "the planner stopped")
