"""A stage's life beside its loop: measure the machine, beat, watch for plans, load the range they name, be ready.

Knows Valkey, the weights and the plan; never a step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Collection
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from noodle.cluster.plan import MachineReport, Plan, StagePhase, StageState
from noodle.cluster.valkey import WorkQueue
from noodle.config.settings import StageConfig
from noodle.errors import Conflict, ModelNotFound, NoodleError, NotReady, QueueUnavailable, RequestTimedOut
from noodle.model.files import names_a_path
from noodle.model.formats import Quality
from noodle.model.weight_cache import WeightCache
from services.stage.loading import load_role, return_freed_memory
from services.stage.selection.report import card_reader, import_early, measured_report
from services.stage.stage import Stage

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PLAN_POLL_SECONDS = 0.2
LOAD_SECONDS = 600.0  # for a range that is loaded by hand


class Lifecycle:
    """What the stage says of itself, and what it loads; `beat` and `follow_plans` are its two threads."""

    def __init__(self, config: StageConfig, stage: Stage, work_queue: WorkQueue) -> None:
        self._config, self._stage, self._queue = config, stage, work_queue
        self._lock = threading.Lock()
        self._state = StageState(config.stage_id, config.machine, stage.boot_id, "starting", transport=config.transport)
        self._report: MachineReport | None = None
        self._weights: WeightCache | None = None  # None: all of the model is in a folder here
        self._refusal = ""  # why this stage may not take part, while another one has its number
        self._silence = ""  # why Valkey hears nothing of this stage
        self._beat_now = threading.Event()
        self._loads: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()  # asked for by hand
        stage.chain.own_changed = self._beat_now.set
        self.stopping = threading.Event()

    @property
    def state(self) -> StageState:
        """What the stage does now, with what it holds."""
        with self._lock:
            state = self._state
            if self._refusal:
                state = msgspec.structs.replace(state, phase="failed", ready_version=0)
            hindrance = self._refusal or self._silence or (self._weights.waits_for if self._weights else "")
            return msgspec.structs.replace(
                state,
                detail=hindrance or state.detail,
                kv_bytes_held=self._stage.kv_bytes_held(),
                sessions=self._stage.worker.session_count,
                outbox_bytes=self._stage.outbox.held_bytes,
                link=self._stage.chain.links()[0],
            )

    @property
    def model_digest(self) -> str:
        """Of the model that this stage serves, empty until the machine is measured."""
        return self._report.model_digest if self._report is not None else ""

    def beat(self) -> None:
        """Tell Valkey each second, and at once when the phase changes; goes on through Valkey's absences."""
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
                    log.warning("can not beat: %s", error)
                self._silence = str(error)
            self._beat_now.wait(BEAT_SECONDS)

    def _claim_number(self) -> None:
        """Say that this stage has its number, and see whether another one says so too: then this one waits."""
        config = self._config
        owner = self._queue.claim_stage(config.stage_id, config.advertise_url)
        refusal = "" if owner == config.advertise_url else (
            f"The number {config.stage_id} is taken by the stage at {owner}, so this one at {config.advertise_url} on "
            f"{config.machine} may not take part. Give it another NOODLE_STAGE_ID, or stop the other one."
        )  # fmt: skip
        if refusal and not self._refusal:
            log.error("%s", refusal)
        elif self._refusal and not refusal:
            log.info("the number %d is free: this stage takes part", config.stage_id)
        self._refusal = refusal

    def follow_plans(self) -> None:
        """Measure, then load whatever the newest plan gives this stage, until `stop`."""
        import_early()
        folder = self._model_folder()
        self._report = measured_report(
            self._config,
            self._stage.boot_id,
            folder,
            lambda done, what: self._say("measuring", what, done),
            partial(self._fetch, "the model's quality"),
            self._known_quality,
        )
        if self._report.device == "cuda":
            self._stage.read_card = card_reader()
        with self._lock:
            self._state = msgspec.structs.replace(
                self._state,
                device=self._report.device,
                device_name=self._report.device_name,
                threads=self._report.threads,
                choice=self._report.choice,
            )
        return_freed_memory()
        self._say("waiting", "for a plan")
        while not self.stopping.is_set():
            plan = self._newest_plan()
            if plan is not None and plan.version > self._stage.plan_version and not self._refusal:
                self._follow(plan, folder)
            self._load_by_hand(folder, PLAN_POLL_SECONDS)

    def _known_quality(self, mine: MachineReport) -> Quality | None:
        """What another stage has measured of the same weights of the same model."""
        try:
            reports = self._queue.reports()
        except QueueUnavailable as error:
            log.debug("nobody is asked for the model's quality: %s", error)
            return None
        wanted = (mine.model_digest, mine.executor, mine.weights, mine.kv_dtype)
        for report in reports:
            if (report.model_digest, report.executor, report.weights, report.kv_dtype) == wanted and report.quality:
                return report.quality
        return None

    def load_now(self, start_layer: int | None, end_layer: int | None, reload: bool) -> dict[str, Any]:
        """Load this stage's range of the newest plan by hand, unless it is loaded; gives what it holds then.

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

    def _model_folder(self) -> Path:
        """The model's folder here, or one of which only the wanted tensors are fetched from the coordinator."""
        config = self._config
        if (folder := Path(config.model)).is_dir():
            return folder
        if names_a_path(config.model):
            raise ModelNotFound(
                f"Stage {config.stage_id} on {config.machine} finds no folder {config.model!r}.",
                cure="Correct NOODLE_MODEL, or leave it out: then the weights come from NOODLE_COORDINATOR_URL.",
            )
        self._say("starting", f"asking {config.coordinator_url} for the model")
        self._weights = WeightCache(
            config.cache_dir, config.coordinator_url, config.cluster_token, self.stopping, config.machine
        )
        return self._weights.prepare()

    def _fetch(self, layers: str, keys: Collection[str]) -> None:
        """Bring tensors that are not on this machine yet."""
        if self._weights is None:
            return

        def progress(done_bytes: int, total_bytes: int) -> None:
            done = f"{done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
            self._say(detail=f"{layers}, fetching {done}", progress=done_bytes / max(1, total_bytes))

        self._weights.ensure(keys, progress)
        log.info("%d bytes of weights were fetched since the start", self._weights.fetched_bytes)
        self._say(detail=layers)

    def leave(self) -> Plan | None:
        """Ask for this stage's layers to be moved to the others, until it starts again; gives the newest plan."""
        if self._report is None:
            raise NotReady(f"Stage {self._config.stage_id} still measures its machine.", retry_after_seconds=2)
        if not self._report.leaving:
            if not any(
                other.stage_id != self._config.stage_id and not other.leaving for other in self._queue.reports()
            ):
                raise Conflict(
                    f"Stage {self._config.stage_id} is the last one: no other could take its layers.",
                    cure="Start another stage first, or stop this one.",
                )
            log.info("this stage wants to leave: its layers go to the others")
            self._report = msgspec.structs.replace(self._report, leaving=True)
            self._beat_now.set()
        return self._queue.plan()

    def stop(self) -> None:
        """Say goodbye: what this stage said of itself is taken back."""
        self.stopping.set()
        self._beat_now.set()
        try:
            self._queue.forget_stage(self._config.stage_id, self._config.advertise_url)
        except QueueUnavailable as error:
            log.warning("could not say goodbye: %s", error)

    def _planned(self, start_layer: int | None, end_layer: int | None) -> Plan:
        """The newest plan, when it gives this stage these layers."""
        stage_id = self._config.stage_id
        if self._report is None:
            raise NotReady(
                f"Stage {stage_id} still measures its machine ({self.state.progress:.0%}).", retry_after_seconds=2
            )
        plan = self._queue.plan()
        if plan is None:
            raise Conflict(
                f"There is no plan that says what stage {stage_id} is to load.",
                cure="Start the planner and as many stages as NOODLE_STAGES says; /health of the planner says what it "
                "waits for.",
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

    def _load_by_hand(self, folder: Path, wait_seconds: float) -> None:
        """Load the newest plan when somebody asks within this time; all who ask meanwhile get the same answer."""
        asked: list[Future[None]] = []
        try:
            asked.append(self._loads.get(timeout=wait_seconds))
            while True:
                asked.append(self._loads.get_nowait())
        except queue.Empty:
            pass
        if not asked:
            return
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
        """Load this stage's range of a plan; a failure is said, not fatal: the next plan may fit."""
        index = plan.index_of(self._config.stage_id)
        if index is None:
            self._stage.become(plan.version, None)
            self._say("waiting", f"plan {plan.version} gives this stage no layers")
            return
        if self._report is None or plan.model_digest != self._report.model_digest:
            self._stage.become(plan.version, None)
            self._say("failed", f"plan {plan.version} is for other weights than those in {folder}")
            return
        mine = plan.stages[index]
        layers = f"layers {mine.start_layer} to {mine.end_layer - 1}"
        self._say("loading", layers)
        try:
            role = load_role(
                self._stage,
                self._report,
                plan,
                index,
                folder,
                progress=lambda done: self._say(progress=done),
                fetch=partial(self._fetch, layers),
            )
        except NoodleError as error:
            log.exception("plan %d can not be loaded", plan.version)
            self._stage.become(plan.version, None)
            self._say("failed", str(error))
            return
        self._stage.become(plan.version, role)
        return_freed_memory()
        kv_bytes = self._stage.kv_budget_bytes
        with self._lock:
            self._state = msgspec.structs.replace(
                self._state,
                phase="ready",
                detail=layers,
                progress=1.0,
                ready_version=plan.version,
                kv_budget_bytes=kv_bytes,
                kv_bytes_per_token=role.model_slice.kv_bytes_per_token,
                kv_counts_reservations=role.model_slice.counts_reservations,
                weight_bytes=role.model_slice.weight_bytes,
                executor=mine.executor,
                weights=mine.weights,
            )
        self._beat_now.set()
        log.info("ready for plan %d: %s, %d bytes of weights", plan.version, layers, role.model_slice.weight_bytes)

    def _say(self, phase: StagePhase | None = None, detail: str | None = None, progress: float = 0.0) -> None:
        with self._lock:
            changed = phase is not None and phase != self._state.phase
            self._state = msgspec.structs.replace(
                self._state,
                phase=phase or self._state.phase,
                detail=self._state.detail if detail is None else detail,
                progress=progress,
                ready_version=0 if changed else self._state.ready_version,
            )
        if changed:
            self._beat_now.set()


def new_boot_id() -> str:
    """Names this process, and with it the KV cache that lives and dies with it."""
    return uuid.uuid4().hex
