"""Which coordinator leads, and by which plan: keeps the lease, and activates a plan when all its stages are ready.

One coordinator leads by a lease in Valkey; its epoch is in every step, and stages refuse older ones (design D14).
While Valkey is away the leader continues: no other can take the lead then.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass, field

from noodle.cluster.plan import Plan, PlannerState, StageState
from noodle.cluster.valkey import WorkQueue
from noodle.errors import NotReady, QueueUnavailable
from services.coordinator.engine.admission import Activate, StandBy
from services.coordinator.engine.loop import EngineLoop
from services.coordinator.engine.sequence import PlanLimits

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
RENEW_SECONDS = 1.0  # the lease lasts five
SEARCH_SECONDS = 1.0  # between two searches for stages, which take longer than a look at known ones
# Cost of a prompt's token as a share of a decode token, until it is measured; it only scales deadlines.
ASSUMED_PREFILL_SHARE = 0.5


@dataclass(slots=True)
class ClusterView:
    """What this coordinator last saw in Valkey, for /health."""

    queue_error: str = ""
    disagreement: str = ""  # between stages and this coordinator about NOODLE_TRANSPORT
    leader: str = ""
    planner: PlannerState | None = None
    plan: Plan | None = None
    stages: dict[int, StageState] = field(default_factory=dict)


class Leadership:
    """This coordinator's lease and its view of the cluster; `run` is its thread."""

    def __init__(self, machine: str, work_queue: WorkQueue, loop: EngineLoop, transport: str) -> None:
        self._transport = transport
        self._name = f"{machine}/{uuid.uuid4().hex[:8]}"
        self._queue, self._loop = work_queue, loop
        self._epoch: int | None = None
        self._active_version = 0
        self._limits: PlanLimits | None = None
        self.view = ClusterView()
        self.led = threading.Semaphore(0)  # released whenever this coordinator takes the lead
        self.stopping = threading.Event()

    @property
    def leads(self) -> bool:
        return self._epoch is not None

    def run(self) -> None:
        renew_at = search_at = 0.0
        while not self.stopping.is_set():
            try:
                now = time.monotonic()
                if now >= renew_at or self._epoch is None:
                    self._keep_lead()
                    renew_at = now + RENEW_SECONDS
                if searches := now >= search_at:
                    search_at = now + SEARCH_SECONDS
                self._look(searches=searches)
                if self.view.queue_error:
                    log.info("Valkey answers again")
                self.view.queue_error = ""
            except QueueUnavailable as error:
                if not self.view.queue_error:
                    log.warning("%s", error)
                self.view.queue_error = str(error)
            self.stopping.wait(LOOK_SECONDS)

    def stop(self) -> None:
        """Give up the lease at once."""
        self.stopping.set()
        self.led.release()
        try:
            if self._epoch is not None:
                self._queue.end_lease(self._name)
        except QueueUnavailable as error:
            log.warning("the lease could not be given back: %s", error)

    def _keep_lead(self) -> None:
        if self._epoch is not None and self._queue.renew_lease(self._name):
            return
        lost = self._epoch is not None
        self._epoch = self._queue.take_lease(self._name)
        self._active_version = 0  # activate the plan again under the new epoch
        if self._epoch is not None:
            log.info("this coordinator leads, epoch %d", self._epoch)
            self.led.release()
            self.view.leader = self._name
            return
        self.view.leader = self._queue.leader() or ""
        if lost:
            log.warning("another coordinator leads: %s", self.view.leader)
            error = NotReady(f"The coordinator {self.view.leader} leads now.", cure="Send requests to that one.")
            self._loop.notify(StandBy(error))

    def _look(self, *, searches: bool) -> None:
        planned = self.view.plan.stages if self.view.plan else ()
        known = () if searches else {*self.view.stages, *(stage.stage_id for stage in planned)}
        self.view.planner, self.view.plan, known_stages = self._queue.look(known)
        self.view.stages = self._queue.stage_states() if searches else known_stages
        plan = self.view.plan
        if self._epoch is None or plan is None:
            return
        states = [self.view.stages.get(stage.stage_id) for stage in plan.stages]
        ready = [state for state in states if state is not None and state.ready_version == plan.version]
        if len(ready) < len(plan.stages):
            return
        self.view.disagreement = disagreement_of(ready, self._transport)
        if self.view.disagreement:
            return
        limits = limits_of(plan, ready)
        is_active = plan.version == self._active_version
        if plan.version > self._active_version or (is_active and limits != self._limits):
            self._active_version, self._limits = plan.version, limits
            self._loop.notify(Activate(plan, limits, self._epoch))


def disagreement_of(states: list[StageState], transport: str) -> str:
    """Name the stages whose NOODLE_TRANSPORT differs from this coordinator's, with the cure; empty if none does."""
    others = [state for state in states if state.transport != transport]
    if not others:
        return ""
    named = ", ".join(f"stage {state.stage_id} on {state.machine} has {state.transport}" for state in others)
    return f"one NOODLE_TRANSPORT for all (the coordinator has {transport}, {named}): start them with the same"


def limits_of(plan: Plan, states: list[StageState]) -> PlanLimits:
    """Return the limits of a plan; the tightest stage decides about KV rows."""
    decode_seconds = sum(stage.decode_seconds for stage in plan.stages)
    rooms = [(state.kv_budget_bytes // max(1, state.kv_bytes_per_token), state) for state in states]
    return PlanLimits(
        plan_version=plan.version,
        stage_count=len(plan.stages),
        kv_tokens=min(room for room, _ in rooms),
        context_length=plan.context_length,
        decode_seconds=decode_seconds,
        prefill_seconds_per_token=decode_seconds * ASSUMED_PREFILL_SHARE,
        reserved_kv_tokens=min((room for room, state in rooms if state.kv_reserves_upfront), default=None),
    )


def warnings_of(view: ClusterView) -> list[str]:
    """Return what is degraded but working."""
    if view.plan is None:
        return []
    rooms = [
        (state.kv_budget_bytes // state.kv_bytes_per_token, state)
        for stage in view.plan.stages
        if (state := view.stages.get(stage.stage_id)) is not None
        and state.ready_version == view.plan.version
        and state.kv_bytes_per_token
    ]
    kv_tokens, tightest = min(rooms, key=lambda room: room[0], default=(view.plan.context_length, None))
    if tightest is None or kv_tokens >= view.plan.context_length:
        return []
    return [
        f"Stage {tightest.stage_id} on {tightest.machine} has room for KV rows of {kv_tokens} tokens, less than the "
        f"context of {view.plan.context_length}: a request of more tokens is refused. Give it more (NOODLE_KV_BYTES), "
        "or lower the context (NOODLE_CONTEXT_LENGTH)."
    ]


def waiting_for(view: ClusterView, leads: bool, loop_detail: str, up: bool) -> list[str]:
    """Return what this coordinator waits for until it is ready, in the order in which it must happen."""
    if up:
        return []
    if view.queue_error:
        return [view.queue_error]
    if not leads:
        return [f"the coordinator {view.leader or 'that led'} to give up the lead"]
    if view.planner is None:
        return ["the planner to answer"]
    if view.plan is None or view.planner.phase in ("waiting", "failed", "starting"):
        stages = [_stage_in_words(state) for state in sorted(view.stages.values(), key=lambda state: state.stage_id)]
        return [f"the plan: {view.planner.detail}", *stages]
    late = []
    for stage in view.plan.stages:
        state = view.stages.get(stage.stage_id)
        if state is None:
            late.append(f"stage {stage.stage_id} on {stage.machine} to answer")
        elif state.ready_version != view.plan.version:
            late.append(_stage_in_words(state))
    return late or [view.disagreement or loop_detail]


def progress_of(view: ClusterView, up: bool) -> float:
    """Return the progress of the start, 0 to 1: half of it is measuring, half loading."""
    if up:
        return 1.0
    if not view.stages:
        return 0.0
    done = {"starting": 0.0, "measuring": 0.1, "waiting": 0.5, "loading": 0.5, "ready": 1.0, "failed": 0.0}
    span = {"measuring": 0.4, "loading": 0.5}
    parts = [done[state.phase] + span.get(state.phase, 0.0) * state.progress for state in view.stages.values()]
    return min(0.99, sum(parts) / len(parts))


def _stage_in_words(state: StageState) -> str:
    # what a stage does meanwhile is a whole phrase, with the bytes and the time left
    says_all = state.detail and state.phase in ("measuring", "waiting", "loading")
    words = state.detail if says_all else f"{state.phase} {state.detail}".strip()
    return f"stage {state.stage_id} on {state.machine}: {words}"
