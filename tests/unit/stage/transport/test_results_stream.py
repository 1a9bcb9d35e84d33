"""Results on their way to the coordinator: none lost while there is room, no worker that waits for a reader."""

import contextlib
import socket
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from noodle.metrics.counted import TravelMetrics
from noodle.wire.chunked import ChunkStream
from noodle.wire.frames import read_frame
from noodle.wire.messages import KeepAlive, SpanResult, StepResult
from services.stage.transport.results_stream import WAITING_RESULTS, ResultsOutlet

ANSWER_SECONDS = 10.0
AT_ONCE_SECONDS = 1.0
LARGEST = 1 << 20


def outlet_with(by_queue=lambda _: False):
    return ResultsOutlet(TravelMetrics(CollectorRegistry()), by_queue)


MANY_SPANS = [SpanResult("session", 1, place, 1, 7) for place in range(1000)]


def a_result(number, spans=MANY_SPANS[:1]):
    return StepResult(number, 1, 1, spans, [], [])


@contextlib.contextmanager
def served(outlet):
    """Serve the outlet as gunicorn does: each frame that the answer yields becomes a chunk."""
    ours, theirs = socket.socketpair()
    ours.settimeout(ANSWER_SECONDS)

    def serve():
        with contextlib.suppress(OSError, TimeoutError):
            for frame in outlet.serve(theirs):
                theirs.sendall(b"%x\r\n%b\r\n" % (len(frame), frame))
            theirs.sendall(b"0\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    chunks = ChunkStream(ours.recv)
    try:
        assert isinstance(read_frame(chunks.read, LARGEST)[0], KeepAlive)
        yield ours, chunks
    finally:
        outlet.close()
        ours.close()
        thread.join(ANSWER_SECONDS)
        theirs.close()
        assert not thread.is_alive()


def await_serving(outlet, chunks):
    """Wait until the first result is written: until then all results wait."""
    assert outlet.put(a_result(0))
    assert numbers(chunks, 1) == [0]


def numbers(chunks, count):
    """The step ids of the next `count` results."""
    found = []
    while len(found) < count:
        message, _ = read_frame(chunks.read, LARGEST)
        if isinstance(message, StepResult):
            found.append(message.step_id)
    return found


def test_without_a_reader_a_result_is_not_taken():
    assert not outlet_with().put(a_result(1))


def test_results_come_in_their_order_between_keep_alives():
    outlet = outlet_with()
    with served(outlet) as (_, chunks):
        for number in range(100):
            assert outlet.put(a_result(number))
        assert numbers(chunks, 100) == list(range(100))
        assert isinstance(read_frame(chunks.read, LARGEST)[0], KeepAlive)
        assert outlet.put(a_result(100))
        assert numbers(chunks, 1) == [100]


def test_a_reader_that_reads_nothing_stops_no_worker_and_loses_nothing_when_it_reads_again():
    outlet = outlet_with()
    with served(outlet) as (_, chunks):
        await_serving(outlet, chunks)
        taken = 0
        while outlet.put(a_result(taken, MANY_SPANS)):
            taken += 1
            assert taken < 10_000
        start = time.monotonic()
        assert not outlet.put(a_result(taken, MANY_SPANS))
        assert time.monotonic() - start < AT_ONCE_SECONDS
        assert taken > WAITING_RESULTS
        assert numbers(chunks, taken) == list(range(taken))


def test_what_waits_for_a_reader_that_goes_is_put_on_the_queue():
    unread = []
    outlet = outlet_with(unread.append)
    with served(outlet) as (connection, chunks):
        await_serving(outlet, chunks)
        taken = 0
        while outlet.put(a_result(taken, MANY_SPANS)):
            taken += 1
        connection.close()
    ids = sorted(result.step_id for result in unread)  # the last one never waited: the reader had no room for it
    assert ids == list(range(taken + 1 - len(ids), taken + 1))
    assert len(ids) >= WAITING_RESULTS


def test_a_result_for_a_reader_that_has_closed_is_not_taken():
    outlet = outlet_with()
    with served(outlet) as (connection, chunks):
        # the second keep-alive: until then results wait for the first one to be sent
        assert isinstance(read_frame(chunks.read, LARGEST)[0], KeepAlive)
        connection.shutdown(socket.SHUT_RDWR)
        assert not outlet.put(a_result(1))


def test_a_newer_reader_ends_the_older_one():
    outlet = outlet_with()
    with served(outlet) as (_, older), served(outlet) as (_, newer):
        assert read_frame(older.read, LARGEST) is None
        assert outlet.put(a_result(1))
        assert numbers(newer, 1) == [1]


@pytest.mark.parametrize("workers", [4])
def test_results_of_several_threads_do_not_mix(workers):
    outlet = outlet_with()
    with served(outlet) as (_, chunks):
        threads = [
            threading.Thread(target=lambda first=first: [outlet.put(a_result(first + at)) for at in range(25)])
            for first in range(0, workers * 25, 25)
        ]
        for thread in threads:
            thread.start()
        assert sorted(numbers(chunks, workers * 25)) == list(range(workers * 25))
        for thread in threads:
            thread.join()
