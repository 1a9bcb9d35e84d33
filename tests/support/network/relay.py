"""A TCP relay on loopback that can delay, cut and refuse connections, as a bad cable does."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a cut does
PIECE_BYTES = 64 << 10


class Relay:
    """Listens on a free port and passes bytes to and from another; as a context manager, stops at the end."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._lock = threading.Lock()
        self._ways: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.delay_seconds = 0.0  # of each piece, in each direction
        self.cut_after_bytes: int | None = None  # from the target, of each connection from now on
        self.bytes_per_second = 0.0  # from the target, of all connections together; 0 is no limit
        self.passed_bytes = 0  # from the target
        self._free_at = 0.0  # when the link has sent what it took
        self.connections = 0

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Return the address of the relay."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Accept connections, on the same port as before if it had one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and cut open ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut every open connection, losing data in flight; new connections are accepted."""
        with self._lock:
            ways, self._ways = self._ways, set()
        for way in ways:
            _reset(way)

    @contextlib.contextmanager
    def cutting(self, seconds: float) -> Iterator[None]:
        """Cut at an interval for as long as the block runs."""
        over = threading.Event()

        def cut_again() -> None:
            while not over.wait(seconds):
                self.cut()

        thread = threading.Thread(target=cut_again, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port), 5)
            except OSError:
                _reset(near)
                continue
            far.settimeout(None)
            self.connections += 1
            with self._lock:
                self._ways |= {near, far}
            for source, sink, limit in ((near, far, None), (far, near, self.cut_after_bytes)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                named = {"is_from_target": source is far}
                threading.Thread(target=self._pass, args=(source, sink, limit), kwargs=named, daemon=True).start()

    def _take_turn(self, byte_count: int) -> None:
        """Wait as long as a link of this rate needs for the bytes that it took before."""
        with self._lock:
            self.passed_bytes += byte_count
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + (byte_count / self.bytes_per_second if self.bytes_per_second else 0.0)
        if begin > now:
            time.sleep(begin - now)

    def _pass(self, source: socket.socket, sink: socket.socket, limit: int | None, *, is_from_target: bool) -> None:
        passed = 0
        try:
            while piece := source.recv(PIECE_BYTES):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                if limit is not None and passed + len(piece) > limit:
                    sink.sendall(piece[: limit - passed])
                    break
                passed += len(piece)
                if is_from_target:
                    self._take_turn(len(piece))
                sink.sendall(piece)
            else:
                sink.shutdown(socket.SHUT_WR)
                return
        except OSError:
            pass  # cut by this relay or by one end: the other end is closed below
        for way in (source, sink):
            _reset(way)


def _reset(way: socket.socket) -> None:
    with contextlib.suppress(OSError):
        way.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        way.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
    way.close()
