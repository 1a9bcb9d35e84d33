"""How the tokens of both sides are counted when noodle is measured beside llama.cpp."""

import contextlib
import socketserver
import threading

import pytest

from tests.measure.peers.streams import decode_rate, llama_side
from tests.measure.performance.streams import noodle_side, together

PARTIAL = b'data: {"content":"a","tokens_predicted":%d}\n\n'
WHOLE = b'data: {"content":"","stop":true,"tokens_predicted":%d,"prompt":"tokens_predicted"}\n\n'


@contextlib.contextmanager
def answering(*events):
    """Serve the same events to every request; yields the port."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            headers = {}
            while line := self.rfile.readline().strip():
                name, _, value = line.partition(b": ")
                headers[name.lower()] = value
            self.rfile.read(int(headers[b"content-length"]))
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for event in events:
                self.wfile.write(event)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def test_a_token_that_llama_server_withheld_is_counted_by_the_next_event():
    with answering(PARTIAL % 1, PARTIAL % 4, WHOLE % 5) as port:
        (request,) = together(llama_side(port), [[1, 2]], 5)
    assert [count for _, count in request.counts] == [1, 4, 5]


def test_the_last_event_of_llama_server_is_no_further_token():
    with answering(PARTIAL % 1, PARTIAL % 2, WHOLE % 2) as port:
        (request,) = together(llama_side(port), [[1, 2]], 2)
    assert [count for _, count in request.counts] == [1, 2]


def test_each_event_of_noodle_is_a_token_and_a_comment_is_none():
    with answering(b'data: {"token":1}\n\n', b": still there\n\n", b'data: {"token":2}\n\n') as port:
        (request,) = together(noodle_side(port), [[1, 2]], 2)
    assert [count for _, count in request.counts] == [1, 2]


def test_an_answer_without_all_its_tokens_fails_the_measurement():
    with answering(PARTIAL % 1, WHOLE % 1) as port, pytest.raises(AssertionError):
        together(llama_side(port), [[1, 2]], 2)


def test_streams_that_never_decode_together_give_no_rate():
    with answering(WHOLE % 3) as port, pytest.raises(AssertionError, match="more new tokens"):
        decode_rate(llama_side(port), 2, 3)
