"""A stage's life beside its loop: measure the machine, beat, watch for plans, load the layers they name, be ready."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from noodle.cluster.plan import MachineReport, Plan, StageState
from noodle.cluster.transfer import TransferClock
from noodle.cluster.valkey import WorkQueue
from noodle.config.settings import StageConfig
from noodle.errors import Conflict, NoodleError, NotReady, QueueUnavailable, RequestTimedOut
from noodle.model.local import local_model
from noodle.model.weight_cache import WeightCache
from services.stage.executors.base import ReadProgress
from services.stage.loading import load_role, return_freed_memory
from services.stage.selection.report import build_machine_report
from services.stage.stage import Stage

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PLAN_POLL_SECONDS = 0.2
LOAD_SECONDS = 600.0  # for layers that are loaded by hand


class Lifecycle:
    """The stage's published state, and what it loads; `beat` and `follow_plans` are its two threads."""

    def __init__(self, config: StageConfig, stage: Stage, work_queue: WorkQueue) -> None:
        self._config, self._stage, self._queue = config, stage, work_queue
        self._lock = threading.Lock()
        self._state = StageState(config.stage_id, config.machine, stage.boot_id, "starting", transport=config.transport)
        self._report: MachineReport | None = None
        self._weights: WeightCache | None = None  # None: the whole model is here
        self._refusal = ""  # why this stage may not take part, while another one has its number
        self._silence = ""  # why Valkey cannot be reached
        self._beat_now = threading.Event()
        self._loads: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()  # asked for by hand
        stage.chain.own_changed = self._beat_now.set
        self.stopping = threading.Event()

    @property
    def state(self) -> StageState:
        """The stage's phase, and what it holds now."""
        with self._lock:
            state = self._state
            if self._refusal:
                state = replace(state, phase="failed", ready_version=0)
            hindrance = self._refusal or self._silence or (self._weights.waits_for if self._weights else "")
            if hindrance:
                state = replace(state, detail=hindrance, progress=0.0)
            return replace(
                state,
                kv_bytes_held=self._stage.kv_bytes_held(),
                sessions=self._stage.worker.session_count,
                outbox_bytes=self._stage.outbox.held_bytes,
                link=self._stage.chain.links()[0],
            )

    @property
    def model_digest(self) -> str:
        """The digest of the model that this stage serves; empty until the machine is measured."""
        return self._report.model_digest if self._report is not None else ""

    def beat(self) -> None:
        """Publish report and state in Valkey each second, and at once when the phase changes, until `stop`."""
        while not self.stopping.is_set():
            self._beat_now.clear()
            try:
                self._claim_number()
                if self._report is not None and not self._refusal:
                    self._queue.put_report(self._report)
                if not self._refusal:
                    self._queue.put_stage_state(self.state)
                if self._silence:
                    log.info("Valkey answers again")
                self._silence = ""
            except QueueUnavailable as error:
                if not self._silence:
                    log.warning("cannot publish this stage's state: %s", error)
                self._silence = str(error)
            self._beat_now.wait(BEAT_SECONDS)

    def _claim_number(self) -> None:
        """Claim this stage's number; while another stage has it, this one waits."""
        config = self._config
        owner = self._queue.claim_stage(config.stage_id, config.advertise_url)
        refusal = ""
        if owner != config.advertise_url:
            refusal = (
                f"The number {config.stage_id} is taken by the stage at {owner}, so this one at "
                f"{config.advertise_url} on {config.machine} may not take part. Give it another NOODLE_STAGE_ID, or "
                "stop the other one."
            )
        if refusal and not self._refusal:
            log.error("%s", refusal)
        elif self._refusal and not refusal:
            log.info("the number %d is free: this stage takes part", config.stage_id)
        self._refusal = refusal

    def follow_plans(self) -> None:
        """Measure the machine, then load what each newer plan gives this stage, until `stop`."""
        folder = self._find_model()
        report = self._report = build_machine_report(
            self._config,
            self._stage.boot_id,
            folder,
            progress=lambda done, what: self._update(phase="measuring", detail=what, progress=done),
        )
        if report.device == "cuda" and report.executor == "transformers":
            from services.stage.executors.transformers.runtime import card_use  # only now: it imports torch

            self._stage.read_card = card_use
        return_freed_memory()
        self._update(
            phase="waiting",
            detail="waiting for a plan",
            device=report.device,
            device_name=report.device_name,
            threads=report.threads,
            choice=report.choice,
        )
        while not self.stopping.is_set():
            plan = self._newest_plan()
            if plan is not None and plan.version > self._stage.plan_version and not self._refusal:
                self._follow(plan, folder)
            self._load_by_hand(folder, PLAN_POLL_SECONDS)

    def leave(self) -> Plan | None:
        """Ask for this stage's layers to be moved to the others until it restarts; returns the newest plan."""
        report = self._measured()
        if not report.leaving:
            if not any(
                other.stage_id != self._config.stage_id and not other.leaving for other in self._queue.reports()
            ):
                raise Conflict(
                    f"Stage {self._config.stage_id} is the last one: no other could take its layers.",
                    cure="Start another stage first, or stop this one.",
                )
            log.info("this stage wants to leave: its layers go to the others")
            self._report = replace(report, leaving=True)
            self._beat_now.set()
        return self._queue.plan()

    def stop(self) -> None:
        """End both threads and remove this stage's state from Valkey."""
        self.stopping.set()
        self._beat_now.set()
        try:
            self._queue.forget_stage(self._config.stage_id, self._config.advertise_url)
        except QueueUnavailable as error:
            log.warning("this stage's state could not be removed: %s", error)

    def load_now(self, start_layer: int | None, end_layer: int | None, reload: bool) -> dict[str, Any]:
        """Load this stage's layers of the newest plan by hand, unless they are loaded; returns what it holds then.

        Raises Conflict when there is no plan, when the plan gives this stage other layers than these (None: any), or
        when they could not be loaded; NotReady while the machine is measured.
        """
        began = time.monotonic()
        plan = self._planned(start_layer, end_layer)
        if reload or self.state.ready_version != plan.version:
            done: Future[None] = Future()
            self._loads.put(done)
            try:
                done.result(LOAD_SECONDS)
            except TimeoutError as error:
                raise RequestTimedOut(
                    f"Stage {self._config.stage_id} has not loaded in {LOAD_SECONDS:.0f} s ({self.state.detail}).",
                    cure="See its /health.",
                ) from error
        state, role = self.state, self._stage.role
        if role is None or state.ready_version < plan.version:
            raise Conflict(
                f"Stage {self._config.stage_id} could not load plan {plan.version}: {state.detail}.",
                cure="See its log.",
            )
        mine = role.plan.stages[role.index]
        return {
            "stage_id": self._config.stage_id,
            "machine": self._config.machine,
            "layers": [mine.start_layer, mine.end_layer],
            "plan_version": role.plan.version,
            "dtype": mine.dtype,
            "weight_bytes": state.weight_bytes,
            "kv_budget_bytes": state.kv_budget_bytes,
            "load_seconds": round(time.monotonic() - began, 3),
        }

    def _planned(self, start_layer: int | None, end_layer: int | None) -> Plan:
        """Return the newest plan, if it gives this stage these layers."""
        self._measured()
        stage_id, plan = self._config.stage_id, self._queue.plan()
        if plan is None:
            raise Conflict(
                f"There is no plan yet that gives stage {stage_id} layers to load.",
                cure="Start the planner and NOODLE_STAGES stages; the planner's /health names what it waits for.",
            )
        index = plan.index_of(stage_id)
        if index is None:
            raise Conflict(f"Plan {plan.version} gives stage {stage_id} no layers.")
        mine = plan.stages[index]
        for asked, planned in ((start_layer, mine.start_layer), (end_layer, mine.end_layer)):
            if asked is not None and asked != planned:
                raise Conflict(
                    f"Plan {plan.version} gives stage {stage_id} the layers [{mine.start_layer}, {mine.end_layer}), "
                    f"not [{start_layer}, {end_layer}).",
                    cure="Set NOODLE_SPLIT on the planner to cut otherwise, or leave the range out.",
                )
        return plan

    def _measured(self) -> MachineReport:
        if self._report is None:
            raise NotReady(
                f"Stage {self._config.stage_id} still measures its machine ({self.state.progress:.0%}).",
                retry_after_seconds=2,
            )
        return self._report

    def _load_by_hand(self, folder: Path, wait_seconds: float) -> None:
        """Load the newest plan if a request for it comes in this time; all that wait get the same answer."""
        try:
            asked = [self._loads.get(timeout=wait_seconds)]
        except queue.Empty:
            return
        asked += [self._loads.get() for _ in range(self._loads.qsize())]  # no other thread takes any
        plan = self._newest_plan()
        if plan is not None:
            self._follow(plan, folder)
        for done in asked:
            done.set_result(None)

    def _newest_plan(self) -> Plan | None:
        try:
            return self._queue.plan()
        except QueueUnavailable as error:
            log.debug("no plan read: %s", error)
            return None

    def _follow(self, plan: Plan, folder: Path) -> None:
        """Load this stage's layers of a plan; a failure is published and not fatal: the next plan may fit."""
        index = plan.index_of(self._config.stage_id)
        if index is None:
            self._stage.become(plan.version, None)
            self._update(phase="waiting", detail=f"waiting: plan {plan.version} gives this stage no layers")
            return
        if self._report is None or plan.model_digest != self._report.model_digest:
            self._stage.become(plan.version, None)
            self._update(phase="failed", detail=f"plan {plan.version} is for other weights than those in {folder}")
            return
        mine = plan.stages[index]
        layers = f"layers {mine.start_layer} to {mine.end_layer - 1}"
        self._update(phase="loading", detail=f"loading {layers}")
        try:
            role = load_role(
                self._stage,
                self._report,
                plan,
                index,
                folder,
                progress=self._transfer(f"loading {layers}"),
                fetch=partial(self._fetch, layers),
            )
        except NoodleError as error:
            log.exception("plan %d cannot be loaded", plan.version)
            self._stage.become(plan.version, None)
            self._update(phase="failed", detail=str(error))
            return
        self._stage.become(plan.version, role)
        return_freed_memory()
        model_slice = role.model_slice
        self._update(
            phase="ready",
            detail=layers,
            progress=1.0,
            ready_version=plan.version,
            kv_budget_bytes=self._stage.kv_budget_bytes,
            kv_bytes_per_token=model_slice.kv_bytes_per_token,
            kv_reserves_upfront=model_slice.reserves_upfront,
            weight_bytes=model_slice.weight_bytes,
            executor=mine.executor,
            weights=mine.weights,
            choice="; ".join(filter(None, (self._report.choice, model_slice.weights_note))),
        )
        log.info("ready for plan %d: %s, %d bytes of weights", plan.version, layers, model_slice.weight_bytes)

    def _find_model(self) -> Path:
        """The model here, or files into which only the needed tensors are fetched from the coordinator."""
        config = self._config
        found = local_model(config.model, f"Stage {config.stage_id} on {config.machine}")
        if found is not None:
            return found
        self._update(phase="starting", detail=f"asking {config.coordinator_url} for the model")
        self._weights = WeightCache(
            config.cache_dir, config.coordinator_url, config.cluster_token, self.stopping, config.machine
        )
        return self._weights.prepare()

    def _fetch(self, layers: str, keys: Collection[str]) -> None:
        if self._weights is None:
            return

        self._weights.ensure(keys, self._transfer(f"fetching {layers}"))
        log.info("%d bytes of weights fetched since the start", self._weights.fetched_bytes)
        self._update(detail=f"loading {layers}")

    def _transfer(self, what: str) -> ReadProgress:
        """Return what publishes the bytes, the rate and the time left of one transfer."""
        clock = TransferClock()

        def publish(done_bytes: int, total_bytes: int) -> None:
            text = clock.text(done_bytes, total_bytes)
            self._update(detail=f"{what}, {text}", progress=done_bytes / max(1, total_bytes))

        return publish

    def _update(self, **changes: Any) -> None:
        """Change fields of the state; `progress` falls to 0, and `ready_version` with the phase, unless given."""
        with self._lock:
            is_new_phase = changes.get("phase", self._state.phase) != self._state.phase
            if is_new_phase:
                changes = {"ready_version": 0, **changes}
            self._state = replace(self._state, **{"progress": 0.0, **changes})
        if is_new_phase:
            self._beat_now.set()
