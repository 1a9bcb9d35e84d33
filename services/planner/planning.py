"""The planner's loop: wait for the stages, cut the model by what they measured, publish the plan."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import msgspec

from noodle import __version__
from noodle.cluster.plan import MachineReport, ModelShape, Plan, PlannerState, StageAssignment
from noodle.cluster.valkey import WorkQueue
from noodle.config.addresses import host_of, why_only_local
from noodle.config.settings import PlannerConfig
from noodle.errors import ConfigurationError, NoodleError, QueueUnavailable
from noodle.model.families import check_supported
from noodle.model.files import read_config
from noodle.model.local import local_model
from noodle.model.weight_cache import WeightCache
from services.planner.membership import Membership, MembershipTracker
from services.planner.model_shape import read_model_shape
from services.planner.partition import check_split_sum, partition

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.3
PLANNED_KV_TOKENS = 4096  # KV rows every stage must have room for, or the context if that is shorter


class Planning:
    """`run` is the planner's thread; the routes read `current_state`, `shape`, `plan` and `reports`."""

    def __init__(self, config: PlannerConfig, work_queue: WorkQueue) -> None:
        self._config, self._queue = config, work_queue
        self.state = PlannerState("starting", "reading the model's shape")
        self.shape: ModelShape | None = None
        self.plan: Plan | None = None
        self.reports: list[MachineReport] = []
        self._membership = MembershipTracker(config.stage_return_seconds)
        self._weights: WeightCache | None = None  # None: the model is on this machine, or not requested yet
        self.stopping = threading.Event()

    @property
    def current_state(self) -> PlannerState:
        """The state, with what it waits for while the model's headers are fetched."""
        waits_for = self._weights.waits_for if self._weights is not None else ""
        return msgspec.structs.replace(self.state, detail=waits_for) if waits_for else self.state

    @property
    def has_model(self) -> bool:
        """Whether the model is on this machine; otherwise its headers come from the coordinator."""
        return self._local_model is not None

    @cached_property
    def _local_model(self) -> Path | None:
        return local_model(self._config.model, "The planner")

    def read_shape(self) -> None:
        """Read the model's shape; raises StartError if noodle does not run the model."""
        config = self._config
        model = self._local_model
        if model is None:
            self.state = PlannerState("starting", f"asking {config.coordinator_url} for the model's shape")
            self._weights = WeightCache(
                config.cache_dir, config.coordinator_url, config.cluster_token, self.stopping, "the planner's machine"
            )
            model = self._weights.prepare()
        check_supported(read_config(model))
        shape = read_model_shape(model, config.context_length)
        check_settings(shape, config)
        self.shape = shape

    def run(self) -> None:
        """Plan whenever the machines change, until `stopping`; survives the absence of Valkey."""
        if self.shape is None:
            self.read_shape()
        is_away = False
        while not self.stopping.is_set():
            try:
                self._look()
                self._queue.put_planner_state(self.state)
                is_away = False
            except QueueUnavailable as error:
                if not is_away:
                    log.warning("the machines cannot be read: %s", error)
                is_away = True
                if self.state.phase != "planned":  # a plan holds without Valkey too
                    self.state = PlannerState("waiting", str(error))
            self.stopping.wait(LOOK_SECONDS)

    def _look(self) -> None:
        assert self.shape is not None  # noqa: S101  # `run` reads it first
        self.reports = self._queue.reports()
        self.plan = self._queue.plan()
        stage_count = self._config.stage_count
        membership = self._membership.update(self.plan, self.reports, stage_count, time.monotonic())
        chosen = membership.machines
        if mismatch := find_mismatch(chosen, self.shape) or find_self_pointing(chosen):
            self._fail(mismatch)
            return
        holds = self.plan is not None and still_holds(self.plan, self.shape, chosen, self._config)
        must_stay = membership.is_settled or self._config.split is not None or not chosen
        if self.plan is not None and holds and must_stay:
            self.state = PlannerState("planned", describe(self.plan, membership), self.plan.version)
        elif not holds and len(chosen) < stage_count:
            known = ", ".join(f"stage {report.stage_id} on {report.machine}" for report in chosen) or "none yet"
            detail = f"{len(chosen)} of {stage_count} stages have measured their machine ({known})"
            self.state = PlannerState("waiting", detail)
        else:
            self._replan(self.shape, membership, self.plan if holds else None)

    def _replan(self, shape: ModelShape, membership: Membership, valid_plan: Plan | None) -> None:
        """Publish a plan for the machines that are present; `valid_plan` stays if none is possible."""
        try:
            plan = partition(
                shape,
                membership.machines,
                self._config.split,
                kv_tokens=min(PLANNED_KV_TOKENS, shape.context_length),
                activation_dtype=activation_dtype_of(self._config),
            )
        except NoodleError as error:
            if valid_plan is None:
                self._fail(str(error))
                return
            detail = f"{describe(valid_plan, membership)} No plan is possible without it: {error}"
            if self.state.detail != detail:
                log.warning("%s", detail)
            self.state = PlannerState("planned", detail, valid_plan.version)
            return
        if membership.gone:
            log.warning("layers move away from stage %s", ", ".join(map(str, membership.gone)))
        self.plan = msgspec.structs.replace(plan, version=self._queue.next_plan_version())
        self._queue.put_plan(self.plan)
        self.state = PlannerState("planned", self.plan.reason, self.plan.version)
        log.info("plan %d: %s", self.plan.version, self.plan.reason)

    def _fail(self, detail: str) -> None:
        if self.state.detail != detail:
            log.error("no plan is possible: %s", detail)
        self.state = PlannerState("failed", detail)


def activation_dtype_of(config: PlannerConfig) -> str:
    """NOODLE_HOP_DTYPE, except that exact quality needs float32."""
    return "float32" if config.quality == "exact" else config.activation_dtype


def describe(plan: Plan, membership: Membership) -> str:
    """The plan's reason, after the stages that are not present."""
    absent = dict.fromkeys(membership.away, "is away") | dict.fromkeys(membership.gone, "has left or does not return")
    missing = [
        f"Stage {stage.stage_id} on {stage.machine} {absent[stage.stage_id]}."
        for stage in plan.stages
        if stage.stage_id in absent
    ]
    return " ".join([*missing, plan.reason])


def check_settings(shape: ModelShape, config: PlannerConfig) -> None:
    """Raise ConfigurationError for settings that do not suit the model, before any machine is measured."""
    if config.stage_count > shape.layer_count:
        raise ConfigurationError(
            f"{config.stage_count} stages were asked for, but the model has {shape.layer_count} layers.",
            cure=f"Ask for at most {shape.layer_count} stages.",
        )
    if config.split is not None:
        check_split_sum(config.split, shape)


def find_mismatch(reports: Sequence[MachineReport], shape: ModelShape) -> str:
    """The first stage with another noodle version or model than the planner, with the cure; empty if none."""
    for report in reports:
        stage = f"Stage {report.stage_id} on {report.machine}"
        if report.noodle_version != __version__:
            return (
                f"{stage} runs noodle {report.noodle_version}, and the planner {__version__}. Bring every machine to "
                "the same version, and start it again (with Docker: docker compose up --detach --build)."
            )
        if report.model_digest != shape.digest:
            return (
                f"{stage} has other weights ({report.model_digest[:12]}) than the coordinator's model {shape.name} "
                f"({shape.digest[:12]}). Unset NOODLE_MODEL there so that its weights come from the coordinator, "
                "or set the same model, and start it again."
            )
    return ""


def find_self_pointing(reports: Sequence[MachineReport]) -> str:
    """The first stage whose URL leads the other machines to themselves, with the cure; empty if none.

    On one host all stages may be at 127.0.0.1, but not one of them while another is at an address of the network.
    """
    reasons = [why_only_local(host_of(report.url)) for report in reports]
    if all(reasons):
        return ""
    for report, reason in zip(reports, reasons, strict=True):
        if reason:
            return (
                f"Stage {report.stage_id} on {report.machine} gives its URL as {report.url}, but {reason}. "
                "Set NOODLE_ADVERTISE_URL there to its machine's address, as http://192.168.1.102:8081 (with Docker: "
                "NOODLE_LAN_ADDRESS), and start it again."
            )
    return ""


def still_holds(plan: Plan, shape: ModelShape, reports: Sequence[MachineReport], config: PlannerConfig) -> bool:
    """Whether the plan suits these settings and no present stage contradicts it; absent stages do not."""
    if (plan.model_digest, plan.context_length) != (shape.digest, shape.context_length):
        return False
    if len(plan.stages) > config.stage_count:  # a plan for fewer stages is what remains after some have left
        return False
    if config.split is not None and config.split != tuple(s.end_layer - s.start_layer for s in plan.stages):
        return False
    planned = {stage.stage_id: _assumptions(stage) for stage in plan.stages}
    return all(planned.get(report.stage_id) == _assumptions(report) for report in reports)


def _assumptions(stage: StageAssignment | MachineReport) -> tuple[str, ...]:
    """What a plan takes for granted about a stage."""
    return (stage.url, stage.machine, stage.dtype, stage.executor, stage.weights, stage.kv_dtype)
