"""How a stage reaches the next process: which way a step takes, and what the chain says of it.

direct: the connection alone. queue: references alone. auto: the connection; a large step by reference, so that the
next stage fetches it when it is ready; everything by reference while the connection is down.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from noodle.cluster.plan import Plan
from noodle.errors import LinkLost
from noodle.metrics.counted import TravelMetrics
from noodle.wire.hop_client import HopConnection, KeptOpen
from noodle.wire.messages import HopMessage, HopRefused, KeepAlive, LiveSessions, Step, StepResult
from services.stage.transport.hop_server import Chain
from services.stage.transport.results_stream import ResultsOutlet
from services.stage.worker.inbox import NO_BODY

log = logging.getLogger(__name__)

REFERENCE_BYTES = 1 << 20  # a step of so many bytes goes by reference in auto


class QueuedWay(Protocol):
    """The queued way to the next process."""

    @property
    def failure(self) -> str:
        """Why it can not be used now; empty when it can."""

    def send(self, message: Step | LiveSessions, body: memoryview, *, wait: bool) -> bool:
        """Hand one message on, waiting for room when it may; False when it is not taken."""


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
        queued: QueuedWay | None,
    ) -> None:
        self._plan, self._chain, self._travel, self._queued = plan, chain, travel, queued
        self._url = plan.stages[stage_index + 1].url
        self._lock = threading.Lock()
        self._detail = f"{self._url} is not connected yet"
        self._closed = False
        self._direct: KeptOpen[HopConnection] | None = None

        def open_one(when_lost: Callable[[str], None]) -> HopConnection:
            connection = HopConnection(self._url, cluster_token, self._heard, when_lost, travel.round_trip.observe)
            connection.open(plan.version)
            return connection

        if is_direct:
            self._direct = KeptOpen("next stage", "stage", open_one, self._direct_changed)
        self.tell()

    def send(self, message: Step | LiveSessions, body: memoryview = NO_BODY) -> bool:
        """Send one message on; False when no way leads there: the coordinator hears it from the chain."""
        queued = self._queued
        is_large = body.nbytes >= REFERENCE_BYTES and queued is not None and not queued.failure
        if is_large and queued is not None and self._direct is not None and queued.send(message, body, wait=False):
            return self._counted("queue", message, body)
        if self._send_directly(message, body):
            return self._counted("direct", message, body)
        if queued is not None and queued.send(message, body, wait=True):
            return self._counted("queue", message, body)
        return False

    def tell(self) -> None:
        """Say in the chain how the next stage is reached now."""
        with self._lock:
            if self._closed:
                return
            direct, version = self._direct, self._plan.version
            losses = direct.losses if direct is not None else 0
            if direct is not None and direct.connection is not None:
                self._chain.set_own(version, True, losses=losses)
            elif self._queued is not None and not self._queued.failure:
                self._chain.set_own(version, True, "by the queue", by_queue=True, losses=losses)
            else:
                reasons = [self._detail] if direct is not None else []
                reasons += [self._queued.failure] if self._queued is not None else []
                self._chain.set_own(version, False, "; ".join(reasons), losses=losses)

    def close(self) -> None:
        """Close the hop and say no more."""
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
            log.warning("not sent on: %s", error)
            return False
        return True

    def _counted(self, transport: str, message: Step | LiveSessions, body: memoryview) -> bool:
        if isinstance(message, Step):
            self._travel.step(transport, body.nbytes)
        return True

    def _direct_changed(self, reason: str) -> None:
        if not reason:
            log.info("the hop to %s stands", self._url)
        elif not self._detail:
            log.warning("the hop to the next stage is lost: %s", reason)
        self._detail = reason
        self.tell()

    def _heard(self, message: HopMessage) -> None:
        if isinstance(message, KeepAlive):
            self._chain.set_behind(message.chain)
        elif isinstance(message, HopRefused):
            log.warning("stage %d refused a frame: %s (%s)", message.stage_id, message.message, message.reason)


class ResultsWay:
    """Results to whoever reads them over a connection, else by the queue."""

    def __init__(self, direct: ResultsOutlet | None, queue: Callable[[StepResult], bool] | None, travel: TravelMetrics):
        self._direct, self._queue, self._travel = direct, queue, travel

    def put(self, result: StepResult) -> bool:
        """Hand one result to the coordinator; False when no way leads there."""
        if self._direct is not None and self._direct.put(result):
            self._travel.results.labels("direct").inc()
            return True
        return self.put_queued(result)

    def put_queued(self, result: StepResult) -> bool:
        """The same without a connection: also for what the reader of one left behind."""
        if self._queue is None or not self._queue(result):
            return False
        self._travel.results.labels("queue").inc()
        return True
