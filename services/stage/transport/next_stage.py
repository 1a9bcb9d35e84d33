"""The way from a stage to the next one, by NOODLE_TRANSPORT.

direct: the connection alone. queue: references alone. auto: the connection; a large step by reference, so that the
next stage fetches it when it is ready; everything by reference while the connection is down.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from noodle.cluster.plan import Plan
from noodle.errors import LinkLost
from noodle.metrics.counted import TravelMetrics
from noodle.wire.hop_client import HopConnection, KeptOpen
from noodle.wire.messages import HopMessage, HopRefused, KeepAlive, LiveSessions, Step
from services.stage.transport.hop_server import Chain
from services.stage.transport.queued import QueuedOutlet
from services.stage.worker.inbox import NO_BODY

log = logging.getLogger(__name__)

REFERENCE_BYTES = 1 << 20  # from this size on, a step goes by reference in auto


class NextStage:
    """The hop to the next stage of one plan, until it is closed."""

    def __init__(
        self,
        plan: Plan,
        stage_index: int,
        cluster_token: str,
        chain: Chain,
        travel: TravelMetrics,
        *,
        is_direct: bool,
        queued: QueuedOutlet | None,
    ) -> None:
        self._plan, self._chain, self._travel, self._queued = plan, chain, travel, queued
        self._url = plan.stages[stage_index + 1].url
        self._lock = threading.Lock()
        self._detail = f"{self._url} is not connected yet"
        self._closed = False
        self._direct: KeptOpen[HopConnection] | None = None

        def open_one(when_lost: Callable[[str], None]) -> HopConnection:
            connection = HopConnection(self._url, cluster_token, self._received, when_lost, travel.round_trip.observe)
            connection.open(plan.version)
            return connection

        if is_direct:
            self._direct = KeptOpen("next stage", "stage", open_one, self._direct_changed)
        self.update_chain()

    def send(self, message: Step | LiveSessions, body: memoryview = NO_BODY) -> bool:
        """Send one message on; False when the next stage cannot be reached, which the coordinator sees in the chain."""
        queued = self._queued
        prefers_queue = body.nbytes >= REFERENCE_BYTES and self._direct is not None
        if prefers_queue and queued is not None and not queued.end.failure and queued.send(message, body, wait=False):
            transport = "queue"
        elif self._send_directly(message, body):
            transport = "direct"
        elif queued is not None and queued.send(message, body, wait=True):
            transport = "queue"
        else:
            return False
        if isinstance(message, Step):
            self._travel.step(transport, body.nbytes)
        return True

    def update_chain(self) -> None:
        """Set in the chain how the next stage is reached now."""
        with self._lock:
            if self._closed:
                return
            direct, version = self._direct, self._plan.version
            losses = direct.losses if direct is not None else 0
            if direct is not None and direct.connection is not None:
                self._chain.set_own(version, True, losses=losses)
            elif self._queued is not None and not self._queued.end.failure:
                self._chain.set_own(version, True, "by the queue", by_queue=True, losses=losses)
            else:
                reasons = [self._detail] if direct is not None else []
                reasons += [self._queued.end.failure] if self._queued is not None else []
                self._chain.set_own(version, False, "; ".join(reasons), losses=losses)

    def close(self) -> None:
        """Close the hop; the chain is not updated any more."""
        with self._lock:
            self._closed = True
        if self._direct is not None:
            self._direct.close()

    def _send_directly(self, message: Step | LiveSessions, body: memoryview) -> bool:
        connection = self._direct.connection if self._direct is not None else None
        if connection is None:
            return False
        try:
            connection.send(message, body)
        except LinkLost as error:
            log.warning("a message to the next stage was not sent: %s", error)
            return False
        return True

    def _direct_changed(self, reason: str) -> None:
        if not reason:
            log.info("the hop to %s is connected", self._url)
        elif not self._detail:
            log.warning("the hop to the next stage is lost: %s", reason)
        self._detail = reason
        self.update_chain()

    def _received(self, message: HopMessage) -> None:
        if isinstance(message, KeepAlive):
            self._chain.set_behind(message.chain)
        elif isinstance(message, HopRefused):
            log.warning("stage %d refused a frame: %s (%s)", message.stage_id, message.message, message.reason)
