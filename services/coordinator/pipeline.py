"""The coordinator's two connections into the pipeline: the hop to stage 0 and the results of the last stage.

Knows whether every stage of one plan is reachable, and tells its owner; nothing of requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from noodle.errors import LinkLost
from noodle.hop import HopConnection, ResultsConnection
from noodle.messages import ChainLink, HopMessage, HopRefused, KeepAlive, StepResult
from noodle.plan import Plan, StageAssignment
from noodle.web import start_loop

log = logging.getLogger(__name__)

RECONNECT_FIRST_SECONDS = 0.1
RECONNECT_LAST_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PipelineUp:
    """Every stage is reachable; a `boot_id` that differs from before is a KV cache that is gone.

    Told again without a PipelineDown when a hop behind stage 0 was cut and opened in one breath: frames may be lost.
    """

    plan_version: int
    boot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PipelineDown:
    """Some stage is not reachable, and why."""

    plan_version: int
    reason: str


@dataclass(frozen=True, slots=True)
class ResultArrived:
    """One result from the last stage."""

    result: StepResult


PipelineEvent = PipelineUp | PipelineDown | ResultArrived


class Pipeline:
    """Keeps both connections of one plan open until it is closed, trying again with back-off."""

    def __init__(
        self, plan: Plan, coordinator_epoch: int, cluster_token: str, tell: Callable[[PipelineEvent], None]
    ) -> None:
        self._plan, self._epoch, self._token, self._tell = plan, coordinator_epoch, cluster_token, tell
        self._hop: HopConnection | None = None
        self._up_with: tuple[tuple[str, int], ...] | None = None  # each stage's boot_id and next_link_number
        self._chain: list[ChainLink] = []
        self._results_open = False
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._closed = threading.Event()
        start_loop("pipeline", self._keep_open, "coordinator")

    def send(self, message: HopMessage, body: bytes = b"") -> None:
        """Send one frame to stage 0; raises LinkLost when it is not there."""
        hop = self._hop
        if hop is None:
            raise LinkLost(f"{self._plan.stages[0].url} is not connected.")
        hop.send(message, body)

    def close(self) -> None:
        """Close both connections; nothing more is told."""
        self._closed.set()
        self._lost.set()

    def _keep_open(self) -> None:
        wait_seconds = RECONNECT_FIRST_SECONDS
        while not self._closed.is_set():
            self._lost.clear()
            first, last = self._plan.stages[0], self._plan.stages[-1]
            hop = HopConnection(first.url, self._token, self._heard, partial(self._when_lost, first))
            results = ResultsConnection(last.url, self._token, self._heard, partial(self._when_lost, last))
            opening = last
            try:
                results.open(self._plan.version, self._epoch)
                with self._lock:
                    self._results_open = True
                opening = first
                hop.open(self._plan.version)
                self._hop = hop
                self._look()
                wait_seconds = RECONNECT_FIRST_SECONDS
                self._lost.wait()
            except LinkLost as error:
                self._when_lost(opening, str(error))
            self._hop = None
            hop.close()
            results.close()
            with self._lock:
                self._results_open = False
                self._chain = []
            self._closed.wait(wait_seconds)
            wait_seconds = min(wait_seconds * 2, RECONNECT_LAST_SECONDS)

    def _heard(self, message: HopMessage) -> None:
        if isinstance(message, StepResult):
            self._tell(ResultArrived(message))
        elif isinstance(message, KeepAlive) and message.chain:
            with self._lock:
                self._chain = message.chain
            self._look()
        elif isinstance(message, HopRefused):
            log.warning("stage %d refused a frame: %s (%s)", message.stage_id, message.message, message.reason)

    def _look(self) -> None:
        """Compare what the chain says with the plan, and tell the change."""
        with self._lock:
            links = tuple((link.boot_id, link.next_link_number) for link in self._chain)
            missing = self._missing()
            if not self._results_open or self._hop is None:
                return
            if missing is None and links != self._up_with:
                self._up_with = links
                event: PipelineEvent = PipelineUp(self._plan.version, tuple(link.boot_id for link in self._chain))
            elif missing is not None and self._up_with is not None:
                self._up_with = None
                event = PipelineDown(self._plan.version, missing)
            else:
                return
        self._tell(event)

    def _missing(self) -> str | None:
        """What is missing for the whole pipeline, None when nothing is."""
        for index, stage in enumerate(self._plan.stages):
            if index >= len(self._chain):
                return f"{_named(stage)} is not connected"
            link = self._chain[index]
            if link.stage_id != stage.stage_id or link.plan_version != self._plan.version:
                return f"{_named(stage)} is not ready for plan {self._plan.version}"
            if not link.next_link_up:
                behind = self._plan.stages[min(index + 1, len(self._plan.stages) - 1)]
                reason = f" ({link.detail.rstrip('.')})" if link.detail else ""
                return f"{_named(stage)} does not reach {_named(behind)}{reason}"
        return None

    def _when_lost(self, stage: StageAssignment, reason: str) -> None:
        with self._lock:
            was_up, self._up_with = self._up_with, None
        self._lost.set()
        if was_up is not None and not self._closed.is_set():
            self._tell(PipelineDown(self._plan.version, f"{_named(stage)} is lost ({reason.rstrip('.')})"))


def _named(stage: StageAssignment) -> str:
    return f"stage {stage.stage_id} on {stage.machine}"
