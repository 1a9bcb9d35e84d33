"""The stage's door for steps on the direct way, POST /hop, and the inbox that they wait in.

Knows frames, connections and the bounds of every buffer; not what a step means. The client's end is `noodle/hop.py`,
the door of the results `results_outlet.py`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from noodle.errors import FrameTooLarge, WireError
from noodle.wire.frames import ITEM_BYTES, MAXIMUM_HEADER_BYTES, MAXIMUM_STEP_TOKENS, read_frame, whole_frame
from noodle.wire.hop_client import KEEP_ALIVE_SECONDS, SILENCE_SECONDS
from noodle.wire.messages import ChainLink, HopMessage, HopRefused, KeepAlive, LiveSessions, Step

log = logging.getLogger(__name__)

INBOX_FRAMES = 64
INBOX_BYTES = 256 << 20
INBOX_FULL_SECONDS = 60.0  # a worker that takes nothing for so long has lost its upstream's patience too
NO_BODY = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message for the worker, and when it came by this process's monotonic clock."""

    message: HopMessage | Callable[[], None]  # a function is run by the worker between two steps
    body: memoryview
    arrived_at: float


class Inbox:
    """What waits for the worker, bounded in frames and bytes; a full one holds its writer, and so TCP, back.

    A SimpleQueue carries the arrivals: it wakes the worker in a third of the time that a Condition takes, and a token
    pays for that on every stage. The Condition is for the books alone, and waited for only when the inbox is full.
    """

    def __init__(self, maximum_frames: int = INBOX_FRAMES, maximum_bytes: int = INBOX_BYTES) -> None:
        self._maximum_frames, self._maximum_bytes = maximum_frames, maximum_bytes
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._frames = 0
        self._bytes = 0
        self._changed = threading.Condition()

    def put(self, message: HopMessage | Callable[[], None], body: memoryview = NO_BODY) -> None:
        """Add one message; raises TimeoutError when the worker takes nothing for INBOX_FULL_SECONDS."""
        arrival = Arrival(message, body, time.monotonic())
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(body.nbytes), INBOX_FULL_SECONDS):
                raise TimeoutError(f"the stage's worker took nothing for {INBOX_FULL_SECONDS:.0f} seconds")
            self._frames += 1
            self._bytes += body.nbytes
        self._arrivals.put(arrival)

    def take(self, timeout_seconds: float) -> Arrival | None:
        """The next message, or None when none comes in time."""
        try:
            arrival = self._arrivals.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        with self._changed:
            self._frames -= 1
            self._bytes -= arrival.body.nbytes
            self._changed.notify_all()
        return arrival

    def wait_for_room(self, new_bytes: int, ahead_frames: int) -> None:
        """Return when fewer than `ahead_frames` wait and so many bytes have room; raises TimeoutError as `put` does."""

        def has_room() -> bool:
            return self._frames < ahead_frames and self._has_room(new_bytes)

        with self._changed:
            if not self._changed.wait_for(has_room, INBOX_FULL_SECONDS):
                raise TimeoutError(f"the stage's worker took nothing for {INBOX_FULL_SECONDS:.0f} seconds")

    def _has_room(self, new_bytes: int) -> bool:
        if not self._frames:  # one frame always fits: its own size was bounded before
            return True
        return self._frames < self._maximum_frames and self._bytes + new_bytes <= self._maximum_bytes


class Chain:
    """This stage and those behind it as told to those before it; every change wakes the hop's answer."""

    def __init__(self, stage_id: int, boot_id: str) -> None:
        self._own = ChainLink(stage_id, boot_id, 0, False)
        self._behind: list[ChainLink] = []
        self._changed = threading.Condition()
        self._version = 0
        self.own_changed: Callable[[], None] = lambda: None  # told beside the waiters, for who beats

    def set_own(
        self, plan_version: int, next_link_up: bool, detail: str = "", *, by_queue: bool = False, losses: int = 0
    ) -> None:
        """What this stage is ready for, and how it reaches the next one."""
        with self._changed:
            own = ChainLink(
                self._own.stage_id, self._own.boot_id, plan_version, next_link_up, detail[:2000], by_queue, losses
            )
            if by_queue or not next_link_up:
                self._behind = []
            if own == self._own:
                return
            self._own = own
            self._wake()
        self.own_changed()

    def set_behind(self, chain: list[ChainLink]) -> None:
        """What the next stage said of itself and those behind it."""
        with self._changed:
            if chain != self._behind:
                self._behind = chain
                self._wake()

    def links(self) -> list[ChainLink]:
        """This stage first."""
        with self._changed:
            return [self._own, *self._behind]

    def wait(self, seen_version: int, timeout_seconds: float) -> int:
        """Return when the chain differs from what `seen_version` stood for, or when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen_version, timeout_seconds)
            return self._version

    def wake(self) -> None:
        """Let every waiter look again: a connection has ended."""
        with self._changed:
            self._wake()

    def _wake(self) -> None:
        self._version += 1
        self._changed.notify_all()


def maximum_frame_bytes(hidden_size: int) -> int:
    """The largest frame that a plan with this hidden size can need."""
    return MAXIMUM_HEADER_BYTES + MAXIMUM_STEP_TOKENS * hidden_size * max(ITEM_BYTES.values())


def unbuffered_read(body: Any) -> Callable[[int], bytes]:
    """How to read a streamed body frame by frame.

    gunicorn's `wsgi.input` fetches at least 1,024 bytes at a time, so it would hold a small frame back until the next
    ones fill them up; its chunk reader below gives what is asked for and no more (docs/adr/0003).
    """
    reader = getattr(body, "reader", body)
    read: Callable[[int], bytes] = reader.read
    return read


class HopServer:
    """Takes the frames of the one process before this stage; a newer connection replaces an older one."""

    def __init__(self, stage_id: int, inbox: Inbox, chain: Chain, on_refused: Callable[[str], None]) -> None:
        self._stage_id, self._inbox, self._chain = stage_id, inbox, chain
        self._on_refused = on_refused
        self._current = 0
        self._lock = threading.Lock()
        self._closed = False

    def serve(self, read: Callable[[int], bytes], connection: socket.socket, frame_bytes: int) -> Iterator[bytes]:
        """The answer of one POST /hop: keep-alives with the chain's state, while a thread reads what comes."""
        connection.settimeout(SILENCE_SECONDS)
        with self._lock:
            self._current += 1
            mine = self._current
        self._chain.wake()  # an older connection sees that it is replaced
        refused: queue.SimpleQueue[HopRefused | None] = queue.SimpleQueue()  # holds one: the reader's last word
        asked = [0]  # the newest echo that the other end asked for; it knows which ones it has heard already
        reader = threading.Thread(
            target=self._read, args=(read, frame_bytes, refused, asked, mine), name="read hop", daemon=True
        )
        reader.start()
        seen = -1
        try:
            while not self._closed and mine == self._current:
                yield whole_frame(KeepAlive(self._chain.links(), asked[0]))
                seen = self._chain.wait(seen, KEEP_ALIVE_SECONDS)
                if not reader.is_alive():
                    last_word = refused.get()
                    if last_word is not None:
                        yield whole_frame(last_word)
                    return
        finally:
            # gunicorn reads the rest of a body away after the answer: never while the reader still does
            if reader.is_alive():
                with contextlib.suppress(OSError):  # the other end may have closed it first
                    connection.shutdown(socket.SHUT_RDWR)
                reader.join(SILENCE_SECONDS)

    def close(self) -> None:
        """End the connection; the reader ends with its socket."""
        self._closed = True
        self._chain.wake()

    def _read(
        self,
        read: Callable[[int], bytes],
        frame_bytes: int,
        refused: queue.SimpleQueue[HopRefused | None],
        asked: list[int],
        mine: int,
    ) -> None:
        last_word: HopRefused | None = None
        try:
            while (frame := read_frame(read, frame_bytes)) is not None:
                message, body = frame
                if mine != self._current or self._closed:
                    break
                if isinstance(message, Step | LiveSessions):
                    self._inbox.put(message, body)
                elif isinstance(message, KeepAlive) and message.echo:
                    asked[0] = message.echo
                    self._chain.wake()
                elif not isinstance(message, KeepAlive):
                    raise WireError(f"a {type(message).__name__} does not travel down a hop.")
        except (WireError, TimeoutError) as error:
            reason = "frame_too_large" if isinstance(error, FrameTooLarge) else "bad_frame"
            if isinstance(error, TimeoutError):
                reason = "silence"
            last_word = HopRefused(self._stage_id, reason, str(error))
            self._on_refused(reason)
            log.warning("the hop into stage %d ends: %s (%s)", self._stage_id, error, reason)
        except Exception as error:  # noqa: BLE001  # gunicorn's own errors of a cut or malformed chunked body
            self._on_refused("cut")
            log.info("the hop into stage %d was cut: %s", self._stage_id, error or type(error).__name__)
        refused.put(last_word)
        self._chain.wake()
