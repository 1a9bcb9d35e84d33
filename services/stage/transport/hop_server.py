"""The stage's end of the direct way, POST /hop; the client's end is `noodle/wire/hop_client.py`."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from msgspec.structs import replace

from noodle.errors import FrameTooLarge, WireError
from noodle.wire.frames import ITEM_BYTES, MAXIMUM_HEADER_BYTES, MAXIMUM_STEP_TOKENS, read_frame, whole_frame
from noodle.wire.hop_client import KEEP_ALIVE_SECONDS, SILENCE_SECONDS
from noodle.wire.messages import ChainLink, HopRefused, KeepAlive, LiveSessions, Step
from services.stage.worker.inbox import Inbox

log = logging.getLogger(__name__)


class Chain:
    """The state of this stage and of those behind it, as upstream sees it; every change wakes the hop's answer."""

    def __init__(self, stage_id: int, boot_id: str) -> None:
        self._own = ChainLink(stage_id, boot_id, 0, False)
        self._behind: list[ChainLink] = []
        self._changed = threading.Condition()
        self._version = 0
        self.own_changed: Callable[[], None] = lambda: None  # called when this stage's own link changes

    def set_own(
        self, plan_version: int, next_link_up: bool, detail: str = "", *, by_queue: bool = False, losses: int = 0
    ) -> None:
        """Set what this stage is ready for, and how it reaches the next one."""
        with self._changed:
            own = replace(
                self._own,
                plan_version=plan_version,
                next_link_up=next_link_up,
                detail=detail[:2000],
                by_queue=by_queue,
                losses=losses,
            )
            if by_queue or not next_link_up:
                self._behind = []
            if own == self._own:
                return
            self._own = own
            self.wake()
        self.own_changed()

    def set_behind(self, chain: list[ChainLink]) -> None:
        """Set what the next stage reported of itself and those behind it."""
        with self._changed:
            if chain != self._behind:
                self._behind = chain
                self.wake()

    def links(self) -> list[ChainLink]:
        """This stage first."""
        with self._changed:
            return [self._own, *self._behind]

    def wait(self, seen_version: int, timeout_seconds: float) -> int:
        """Wait until the chain is newer than `seen_version` or the time is over; returns its version."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen_version, timeout_seconds)
            return self._version

    def wake(self) -> None:
        """Wake every waiter: the chain has changed, or a connection has ended."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()


def maximum_frame_bytes(hidden_size: int) -> int:
    """The largest frame that a plan with this hidden size can need."""
    return MAXIMUM_HEADER_BYTES + MAXIMUM_STEP_TOKENS * hidden_size * max(ITEM_BYTES.values())


def unbuffered_read(body: Any) -> Callable[[int], bytes]:
    """Return a function that reads a streamed body without reading ahead.

    gunicorn's `wsgi.input` fetches at least 1,024 bytes at a time and so delays a small frame until the next ones
    fill them up; its chunk reader below returns exactly what is asked for (docs/adr/0003).
    """
    read: Callable[[int], bytes] = getattr(body, "reader", body).read
    return read


class HopServer:
    """Receives the frames of the one process before this stage; a newer connection replaces an older one."""

    def __init__(self, stage_id: int, inbox: Inbox, chain: Chain, on_refused: Callable[[str], None]) -> None:
        self._stage_id, self._inbox, self._chain = stage_id, inbox, chain
        self._on_refused = on_refused
        self._newest: _HopConnection | None = None
        self._closed = False

    def serve(self, read: Callable[[int], bytes], connection: socket.socket, frame_bytes: int) -> Iterator[bytes]:
        """Answer one POST /hop: keep-alives with the chain's state, while a thread reads the frames."""
        connection.settimeout(SILENCE_SECONDS)
        mine = self._newest = _HopConnection()
        self._chain.wake()  # an older connection notices that it is replaced
        reader = threading.Thread(target=self._read, args=(mine, read, frame_bytes), name="read hop", daemon=True)
        reader.start()
        seen = -1
        try:
            while self._serves(mine):
                yield whole_frame(KeepAlive(self._chain.links(), mine.echo))
                seen = self._chain.wait(seen, KEEP_ALIVE_SECONDS)
                if not reader.is_alive():
                    last_word = mine.last_word.get()
                    if last_word is not None:
                        yield whole_frame(last_word)
                    return
        finally:
            # gunicorn discards the rest of a body after the answer: never while the reader still reads
            if reader.is_alive():
                with contextlib.suppress(OSError):  # the other end may have closed it first
                    connection.shutdown(socket.SHUT_RDWR)
                reader.join(SILENCE_SECONDS)

    def close(self) -> None:
        """End the connection; the reader ends with its socket."""
        self._closed = True
        self._chain.wake()

    def _serves(self, connection: _HopConnection) -> bool:
        return connection is self._newest and not self._closed

    def _read(self, mine: _HopConnection, read: Callable[[int], bytes], frame_bytes: int) -> None:
        last_word: HopRefused | None = None
        try:
            while (frame := read_frame(read, frame_bytes)) is not None:
                message, body = frame
                if not self._serves(mine):
                    break
                if isinstance(message, Step | LiveSessions):
                    self._inbox.put(message, body)
                elif isinstance(message, KeepAlive) and message.echo:
                    mine.echo = message.echo
                    self._chain.wake()
                elif not isinstance(message, KeepAlive):
                    raise WireError(f"a {type(message).__name__} does not travel down a hop.")
        except (WireError, TimeoutError) as error:
            reason = "frame_too_large" if isinstance(error, FrameTooLarge) else "bad_frame"
            if isinstance(error, TimeoutError):
                reason = "silence"
            last_word = HopRefused(self._stage_id, reason, str(error))
            self._on_refused(reason)
            log.warning("closing the hop into stage %d: %s (%s)", self._stage_id, error, reason)
        except Exception as error:  # noqa: BLE001  # gunicorn's own errors of a cut or malformed chunked body
            self._on_refused("cut")
            log.info("the hop into stage %d was cut: %s", self._stage_id, error or type(error).__name__)
        mine.last_word.put(last_word)
        self._chain.wake()


class _HopConnection:
    """What the reader of one connection and its answer share."""

    def __init__(self) -> None:
        self.echo = 0  # the newest one asked for; the other end ignores those it has seen
        self.last_word: queue.SimpleQueue[HopRefused | None] = queue.SimpleQueue()  # holds one
