"""One stage put together: its worker, its transport and the plan it is in; routes and lifecycle act on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry

from noodle.cluster.plan import Plan
from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from noodle.config.settings import StageConfig
from noodle.errors import Conflict, NotReady
from noodle.metrics.counted import StageMetrics
from noodle.metrics.scraped import CardUse
from noodle.wire.messages import Step
from noodle.wire.queue_end import QueueEnd, Streams
from services.stage.transport.hop_server import Chain, HopServer
from services.stage.transport.next_stage import NextStage
from services.stage.transport.outbox import Outbox
from services.stage.transport.queued import Fetcher, QueuedInlet, QueuedOutlet, try_write
from services.stage.transport.results_stream import ResultsOutlet
from services.stage.worker.inbox import Inbox
from services.stage.worker.worker import Role, Worker

INSTALL_TIMEOUT_SECONDS = 120.0  # the worker finishes the step in progress first


class Stage:
    """Holds what lives as long as the process; `become` changes what it computes."""

    def __init__(self, config: StageConfig, boot_id: str, registry: CollectorRegistry, streams: Streams) -> None:
        self.config, self.boot_id = config, boot_id
        self.metrics = StageMetrics(registry)
        self.inbox = Inbox()
        self.chain = Chain(config.stage_id, boot_id)
        self.outbox = Outbox()
        self._is_direct = config.transport != "queue"
        self._queue_end: QueueEnd | None = None
        self.results = ResultsOutlet(self.metrics.travel)
        if config.transport != "direct":
            self._queue_end = QueueEnd(
                streams,
                hop_stream(config.stage_id),
                take=lambda entry: self._inlet.take(entry),
                changed=self._queue_changed,
                refused=lambda reason: self.metrics.travel.refused_entries.labels(reason).inc(),
            )
            self.results = ResultsOutlet(
                self.metrics.travel, by_queue=partial(try_write, self._queue_end, RESULTS_STREAM)
            )
        self.hops = HopServer(
            config.stage_id, self.inbox, self.chain, lambda reason: self.metrics.refused_frames.labels(reason).inc()
        )
        self.worker = Worker(config.stage_id, self.inbox, self.results.put, self.metrics)
        fetcher = Fetcher(config.cluster_token)
        self._inlet = QueuedInlet(self.inbox, self._place_of, self.worker.refuse, fetcher, self.metrics)
        self.read_card: Callable[[], CardUse | None] = lambda: None  # set when this stage computes on a card
        self.kv_budget_bytes = 0  # of served requests
        self.plan_version = 0  # of the newest plan this stage has acted on
        self.role: Role | None = None  # set by `become`
        self._link: NextStage | None = None
        self.metrics.outbox_bytes.set_function(lambda: self.outbox.held_bytes)
        self.metrics.kv_bytes.set_function(self.kv_bytes_held)
        self.metrics.kv_capacity_bytes.set_function(lambda: self.kv_budget_bytes if self.role else 0)
        self.metrics.weight_bytes.set_function(lambda: role.model_slice.weight_bytes if (role := self.role) else 0)
        self.metrics.sessions.set_function(lambda: self.worker.session_count)

    def start_queue(self) -> None:
        """Begin to read this stage's stream, unless NOODLE_TRANSPORT is direct."""
        if self._queue_end is not None:
            self._queue_end.start("stage")

    def ready_role(self, plan_version: int) -> Role:
        """Return the role in this plan version; raises NotReady naming the version this stage is ready for."""
        role = self.role
        if role is None or role.plan.version != plan_version:
            ready_for = f"plan {role.plan.version}" if role else "no plan yet"
            raise NotReady(
                f"Stage {self.config.stage_id} on {self.config.machine} is ready for {ready_for}, not {plan_version}.",
                retry_after_seconds=1,
            )
        return role

    def refuse_connections(self) -> None:
        """Raise Conflict when NOODLE_TRANSPORT leaves hops and results to the queue."""
        if not self._is_direct:
            raise Conflict(
                f"Stage {self.config.stage_id} on {self.config.machine} has NOODLE_TRANSPORT=queue and takes no hop.",
                cure="Set the same NOODLE_TRANSPORT for the coordinator and every stage.",
            )

    def kv_bytes_held(self) -> int:
        role = self.role
        return role.model_slice.kv_bytes_held() if role else 0

    def become(self, plan_version: int, role: Role | None) -> None:
        """Compute this role after the step in progress; the old slice's memory is free on return."""
        self.role = None
        if self._link is not None:
            self._link.close()
            self._link = None
        self.outbox.clear()
        self.chain.set_own(0, False, "loading")
        if role is not None and role.index + 1 < len(role.plan.stages):
            role.next_stage = self._link = self._link_of(role)
        installed = threading.Event()
        self.worker.install(role, installed.set)
        if not installed.wait(INSTALL_TIMEOUT_SECONDS):
            raise TimeoutError(f"the worker did not take plan {plan_version} in {INSTALL_TIMEOUT_SECONDS:.0f} seconds")
        self.role = role
        self.plan_version = plan_version
        self._queue_changed()

    def _link_of(self, role: Role) -> NextStage:
        queued = None
        if self._queue_end is not None:
            queued = QueuedOutlet(role.plan, role.index, self.outbox, self._queue_end, self.metrics)
        return NextStage(
            role.plan,
            role.index,
            self.config.cluster_token,
            self.chain,
            self.metrics.travel,
            is_direct=self._is_direct,
            queued=queued,
        )

    def _place_of(self, step: Step) -> tuple[Plan, int] | None:
        """The plan, and this stage's index in it, of a step that is current."""
        role = self.role
        if role is None or step.plan_version != role.plan.version:
            return None
        return (role.plan, role.index) if step.coordinator_epoch >= self.worker.coordinator_epoch else None

    def _queue_changed(self) -> None:
        """Set in the chain how the next process is reached; for the last stage's results it may be the queue alone."""
        link, role = self._link, self.role
        if link is not None:
            link.update_chain()
        elif role is not None:
            failure = self._queue_end.failure if self._queue_end is not None and not self._is_direct else ""
            self.chain.set_own(role.plan.version, not failure, failure)

    def close(self) -> None:
        self.hops.close()
        self.results.close()
        if self._queue_end is not None:
            self._queue_end.close()
        if self._link is not None:
            self._link.close()
        self.worker.stop()
