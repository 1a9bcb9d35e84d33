"""A reader of a chunked HTTP body, faster than those of gunicorn and http.client.

A token waits for each read of a hop's body. Their readers copy each piece through several buffers, which takes longer
than everything else that a hop does with it.
"""

from __future__ import annotations

from collections.abc import Callable

from noodle.errors import WireError

HEX_DIGITS = b"0123456789abcdefABCDEF"
SIZE_LINE_BYTES = 1024  # longest line of a chunk's size with its extensions; hops use four bytes
RECEIVED_BYTES = 64 << 10  # bytes of one read, more for the rest of a larger chunk
MAXIMUM_RECEIVED_BYTES = 1 << 20  # largest read


class ChunkStream:
    """The content of the chunks, read without regard to their bounds.

    `receive(n)` returns at most n bytes as soon as there are any, and b"" at the end of the connection. `held` are
    bytes that were received before.
    """

    def __init__(self, receive: Callable[[int], bytes], held: bytes = b"") -> None:
        self._receive = receive
        self._held, self._at = held, 0
        self._left = 0  # bytes of the current chunk
        self._begun = False  # a line end separates the next chunk from one before it
        self._ended = False

    def read(self, wanted_bytes: int) -> bytes:
        """Read exactly this many bytes, fewer only at the end of the body.

        Raises WireError for malformed chunks, ConnectionResetError when the connection ends within the body.
        """
        begin, end = self._at, self._at + wanted_bytes
        if wanted_bytes <= self._left and end <= len(self._held):  # the common case: a frame is one chunk
            self._at = end
            self._left -= wanted_bytes
            return self._held[begin:end]
        return self._read_on(wanted_bytes)

    def _read_on(self, wanted_bytes: int) -> bytes:
        parts: list[bytes] = []
        while wanted_bytes and not self._ended:
            if not self._left:
                self._begin_chunk()
                continue
            if self._at == len(self._held):
                self._held, self._at = self._more(min(self._left, wanted_bytes)), 0
            part = self._held[self._at : self._at + min(self._left, wanted_bytes)]
            self._at += len(part)
            self._left -= len(part)
            wanted_bytes -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _begin_chunk(self) -> None:
        if self._begun and self._line():
            raise WireError("a chunk is longer than its size.")
        size = self._line().partition(b";")[0].strip()
        if not size or size.strip(HEX_DIGITS):  # int() alone accepts signs, underscores and 0x
            raise WireError(f"the size of a chunk is {size[:20]!r}.")
        self._left = int(size, 16)
        self._begun, self._ended = True, not self._left

    def _line(self) -> bytes:
        """Take the bytes up to the next line end, and the line end."""
        while (end := self._held.find(b"\r\n", self._at)) < 0:
            rest = self._held[self._at :]
            if len(rest) > SIZE_LINE_BYTES:
                raise WireError(f"the size line of a chunk is longer than {SIZE_LINE_BYTES} bytes.")
            self._held, self._at = rest + self._more(0), 0
        line, self._at = self._held[self._at : end], end + 2
        return line

    def _more(self, wanted_bytes: int) -> bytes:
        received = self._receive(min(max(wanted_bytes, RECEIVED_BYTES), MAXIMUM_RECEIVED_BYTES))
        if not received:
            raise ConnectionResetError("the connection ended within a body")
        return received
