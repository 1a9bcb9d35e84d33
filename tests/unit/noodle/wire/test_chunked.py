"""The bytes of a chunked body, however they come and whatever is wrong with them."""

import http.client
import io

import pytest
from hypothesis import given, strategies

from noodle.errors import WireError
from noodle.wire.chunked import SIZE_LINE_BYTES, ChunkStream


def receiving(pieces):
    """A connection that gives these pieces and then ends; at most as many bytes at once as are asked for."""
    left = [piece for piece in pieces if piece]

    def receive(most):
        if not left:
            return b""
        piece = left.pop(0)
        if len(piece) > most:
            left.insert(0, piece[most:])
        return piece[:most]

    return receive


def chunked(chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks if chunk) + b"0\r\n\r\n"


def read_all(stream, sizes):
    """What reads of these sizes give, and then the rest."""
    parts = [stream.read(size) for size in sizes]
    while part := stream.read(7):
        parts.append(part)
    return b"".join(parts)


@given(
    strategies.lists(strategies.binary(max_size=50), max_size=8),
    strategies.lists(strategies.integers(1, 40), max_size=10),
    strategies.integers(1, 30),
    strategies.integers(0, 40),
)
def test_the_same_bytes_come_out_however_the_connection_cuts_them(chunks, sizes, step, held):
    sent = chunked(chunks)
    pieces = [sent[at : at + step] for at in range(held, len(sent), step)]
    assert read_all(ChunkStream(receiving(pieces), sent[:held]), sizes) == b"".join(chunks)


def test_a_body_longer_than_any_buffer_comes_whole():
    chunks = [bytes(range(256)) * 20_000, b"end"]
    stream = ChunkStream(receiving([chunked(chunks)]))
    assert stream.read(256 * 20_000) == chunks[0]
    assert stream.read(100) == b"end"
    assert stream.read(100) == b""


def test_extensions_of_a_chunk_are_passed_over():
    assert ChunkStream(receiving([b"3;name=value\r\nabc\r\n0\r\n\r\n"])).read(10) == b"abc"


@pytest.mark.parametrize(
    "sent",
    [
        b"not a size\r\nabc\r\n",
        b"-3\r\nabc\r\n",
        b"+3\r\nabc\r\n",
        b"0x3\r\nabc\r\n",
        b"1_0\r\nabc\r\n",
        b"\r\nabc\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",  # longer than it says
        b"1" * (SIZE_LINE_BYTES + 10),
    ],
)
def test_what_is_no_chunk_is_refused(sent):
    with pytest.raises(WireError):
        read_all(ChunkStream(receiving([sent])), [3])


@pytest.mark.parametrize("sent", [b"", b"3", b"3\r\nab", b"3\r\nabc", b"3\r\nabc\r\n"])
def test_a_connection_that_ends_within_the_body_is_told_from_its_end(sent):
    with pytest.raises(ConnectionResetError):
        read_all(ChunkStream(receiving([sent])), [])


def test_it_reads_what_the_standard_library_has_taken_with_the_head():
    class Connection:
        def makefile(self, _mode):
            return io.BufferedReader(
                io.BytesIO(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked([b"abc"]))
            )

    answer = http.client.HTTPResponse(Connection())
    answer.begin()
    assert ChunkStream(answer.fp.read1).read(10) == b"abc"
