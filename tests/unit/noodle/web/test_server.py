"""The head of a request as the main loop sees it, and a connection's deadlines, over real sockets of this process."""

import contextlib
import socket
import threading
import time

import pytest

from noodle.errors import TooManyRequests
from noodle.web import connection as connection_module
from noodle.web.connection import SEND_BUFFER_BYTES, ClientConnection
from noodle.web.server import head_is_whole

LIMIT_SECONDS = 5.0


@pytest.fixture
def seconds(monkeypatch):
    """The real deadlines, short enough to be waited for."""
    for name, value in {"SEND_SECONDS": 0.2, "BODY_SECONDS": 0.4, "BODY_MOMENT_SECONDS": 0.05}.items():
        monkeypatch.setattr(connection_module, name, value)
    monkeypatch.setattr(connection_module, "HALF_CLOSED_PROBE_SECONDS", 0.1)


@pytest.fixture
def pair(seconds):
    """The service's end with places for one slow body, and the client's."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        client.settimeout(LIMIT_SECONDS)
        yield stack.enter_context(ClientConnection(listener.accept()[0], threading.Semaphore(1))), client


def taken(action):
    started = time.monotonic()
    with contextlib.suppress(TimeoutError):
        action()
    return time.monotonic() - started


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody",
        b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\n",
        b"GET / HTTP/1.1\r\nHost: a\n",
        b"\n",
    ],
)
def test_a_head_is_whole_at_the_same_byte_however_it_comes(head):
    at_once = next(end for end in range(1, len(head) + 1) if head_is_whole(bytearray(head[:end]), 0))
    by_byte = next(end for end in range(1, len(head) + 1) if head_is_whole(bytearray(head[:end]), end - 1))
    assert at_once == by_byte
    assert head_is_whole(bytearray(head), 0)


@pytest.mark.parametrize("head", [b"", b"\r", b"\r\n", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r"])
def test_a_head_is_not_whole_before_its_empty_line(head):
    assert not head_is_whole(bytearray(head), 0)


def test_nothing_of_a_strangers_body_is_waited_for(pair):
    service, client = pair
    client.sendall(b"here already")
    time.sleep(0.05)  # loopback delivers at once; a wait for it would be what is tested
    assert service.recv(100) == b"here already"
    with pytest.raises(TimeoutError):
        service.recv(100)
    assert taken(lambda: service.recv(100)) < 0.05


def test_a_body_has_one_deadline_however_its_bytes_come(pair):
    service, client = pair
    ended = threading.Event()

    def trickle():
        while not ended.wait(0.02):
            client.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    service.authenticate()

    def receive():
        while service.recv(100):
            pass

    try:
        assert 0.3 < taken(receive) < LIMIT_SECONDS
    finally:
        ended.set()
        thread.join()


def test_a_streamed_body_has_the_sockets_own_timeout(pair):
    service, client = pair
    service.authenticate()
    service.stream()
    service.settimeout(0.1)
    assert 0.05 < taken(lambda: service.recv(100)) < LIMIT_SECONDS
    time.sleep(connection_module.BODY_SECONDS)
    client.sendall(b"later")
    assert service.recv(100) == b"later"


def test_a_slow_body_needs_a_place_and_gives_it_back(pair):
    service, _ = pair
    places = threading.Semaphore(0)
    service._slow_bodies = places
    service.authenticate()
    with pytest.raises(TooManyRequests):
        service.recv(100)
    places.release()
    with pytest.raises(TimeoutError):
        service.recv(100)
    assert not places.acquire(blocking=False)
    service.end()
    service.end()
    assert places.acquire(blocking=False)
    assert not places.acquire(blocking=False)


def test_a_request_after_another_is_a_strangers_again(pair):
    service, _ = pair
    service.authenticate()
    service.begin()
    assert not service.is_authenticated
    assert taken(lambda: service.recv(1)) < 0.05


def test_who_does_not_read_is_written_to_for_a_bounded_time_and_size(pair):
    service, _ = pair
    with pytest.raises(TimeoutError):
        service.sendall(b"x" * (64 << 20))
    assert service.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * SEND_BUFFER_BYTES


def test_a_client_that_has_only_sent_all_is_not_gone_and_one_that_closed_is(pair):
    service, client = pair
    assert not service.has_gone(takes_continue=True)
    client.shutdown(socket.SHUT_WR)
    for _ in range(5):
        assert not service.has_gone(takes_continue=True)
        time.sleep(0.05)
    assert client.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    client.close()
    end = time.monotonic() + LIMIT_SECONDS
    while not service.has_gone(takes_continue=True):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_of_http_1_0_is_sent_nothing_before_its_answer(pair):
    service, client = pair
    client.shutdown(socket.SHUT_WR)
    assert not service.has_gone(takes_continue=False)
    service.close()
    assert client.recv(1000) == b""


def test_a_client_that_reset_its_connection_is_gone_at_the_first_look(pair):
    service, client = pair
    service.sendall(b"never read")
    client.recv(1)  # it is there: closing with bytes unread resets
    client.close()
    end = time.monotonic() + LIMIT_SECONDS
    while not service.has_gone(takes_continue=False):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stuck_client_sees_that_its_answer_is_not_whole(pair):
    service, client = pair
    service.sendall(b"part")
    assert client.recv(100) == b"part"
    service.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(100)
