"""One stage put together: its loop, its doors and the plan it is in; the routes and the lifecycle act on this."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry

from noodle.config import StageConfig
from noodle.errors import NotReady
from noodle.metrics import StageMetrics
from services.stage.forward import Forwards
from services.stage.transport import Chain, HopServer, Inbox, NextStageLink, ResultsOutlet
from services.stage.worker import Role, Worker

INSTALL_TIMEOUT_SECONDS = 120.0  # the worker finishes the step in progress first


class Stage:
    """Holds what lives as long as the process; `become` changes what it computes."""

    def __init__(self, config: StageConfig, boot_id: str, registry: CollectorRegistry) -> None:
        self.config, self.boot_id = config, boot_id
        self.metrics = StageMetrics(registry)
        self.inbox = Inbox()
        self.chain = Chain(config.stage_id, boot_id)
        self.results = ResultsOutlet()
        self.hops = HopServer(
            config.stage_id, self.inbox, self.chain, lambda reason: self.metrics.refused_frames.labels(reason).inc()
        )
        self.worker = Worker(config.stage_id, self.inbox, self.results, self.metrics)
        self.forwards = Forwards(config.stage_id, self.worker, self.metrics)
        self.kv_budget_bytes = 0  # of served requests
        self.plan_version = 0  # of the newest plan this stage has acted on
        self._role: Role | None = None
        self._link: NextStageLink | None = None

    @property
    def role(self) -> Role | None:
        """What this stage computes, None until it has loaded a plan."""
        return self._role

    def ready_role(self, plan_version: int) -> Role:
        """The role in this plan version; raises NotReady naming what this stage is ready for."""
        role = self._role
        if role is None or role.plan.version != plan_version:
            ready_for = f"plan {role.plan.version}" if role else "no plan yet"
            raise NotReady(
                f"Stage {self.config.stage_id} on {self.config.machine} is ready for {ready_for}, not {plan_version}.",
                retry_after_seconds=1,
            )
        return role

    def kv_bytes_held(self) -> int:
        """Bytes of KV rows held now."""
        role = self._role
        return role.model_slice.kv_bytes_held() if role else 0

    def become(self, plan_version: int, role: Role | None) -> None:
        """Compute this role from now on, after the step in progress; the old slice's memory is free on return."""
        self._role = None
        if self._link is not None:
            self._link.close()
            self._link = None
        self.chain.set_own(0, False, "loading")
        if role is not None and role.index + 1 < len(role.plan.stages):
            self._link = NextStageLink(role.plan, role.index, self.config.cluster_token, self.chain)
            role.next_stage = self._link
        installed = threading.Event()
        self.worker.install(role, installed.set)
        if not installed.wait(INSTALL_TIMEOUT_SECONDS):
            raise TimeoutError(f"the worker did not take plan {plan_version} in {INSTALL_TIMEOUT_SECONDS:.0f} seconds")
        self._role = role
        self.plan_version = plan_version
        if role is not None and self._link is None:
            self.chain.set_own(plan_version, True)

    def close(self) -> None:
        """Close every long-lived connection and end the loop."""
        self.hops.close()
        self.results.close()
        if self._link is not None:
            self._link.close()
        self.worker.stop()
