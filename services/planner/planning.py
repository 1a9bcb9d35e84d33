"""The planner's loop: waits for the stages, cuts the model by what they measured, writes the plan.

A stage that falls silent keeps its layers for a while: it may come back (attendance.py). Knows no request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from noodle import __version__
from noodle.cluster.plan import MachineReport, ModelShape, Plan, PlannerState, StageAssignment
from noodle.cluster.valkey import WorkQueue
from noodle.config.addresses import host_of, why_only_local
from noodle.config.settings import PlannerConfig
from noodle.errors import ConfigurationError, ModelNotFound, NoodleError, QueueUnavailable
from noodle.model.families import check_supported
from noodle.model.files import names_a_path, read_config
from noodle.model.weight_cache import WeightCache
from services.planner.membership import Attendance, AttendanceBook
from services.planner.model_shape import read_model_shape
from services.planner.partition import partition
from services.planner.prediction import HopCost

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.3
PLANNED_KV_TOKENS = 4096  # rows every stage must have room for, or the context where that is shorter
ASSUMED_HOP = HopCost(0.001, "assumed")  # until links are measured


class Planning:
    """`run` is its thread; `state` and `plan` are for the routes."""

    def __init__(self, config: PlannerConfig, work_queue: WorkQueue) -> None:
        self._config, self._queue = config, work_queue
        self.state = PlannerState("starting", "reading the model's shape")
        self.shape: ModelShape | None = None
        self.plan: Plan | None = None
        self.reports: list[MachineReport] = []
        self._attendance = AttendanceBook(config.stage_return_seconds)
        self._weights: WeightCache | None = None  # None: the model's folder is here, or not yet asked for
        self.stopping = threading.Event()

    @property
    def told_state(self) -> PlannerState:
        """What the planner does now, with what hinders it."""
        waits_for = self._weights.waits_for if self._weights is not None else ""
        return msgspec.structs.replace(self.state, detail=waits_for) if waits_for else self.state

    @property
    def has_folder(self) -> bool:
        """Whether the model's folder is on this machine; else its headers come from the coordinator."""
        if Path(self._config.model).is_dir():
            return True
        if names_a_path(self._config.model):
            raise ModelNotFound(
                f"The planner finds no folder {self._config.model!r}.",
                cure="Correct NOODLE_MODEL, or leave it out: then the model's shape comes from NOODLE_COORDINATOR_URL.",
            )
        return False

    def read_shape(self) -> None:
        """Read the model's shape; raises StartError when noodle can not run it."""
        config = self._config
        if self.has_folder:
            folder = Path(config.model)
        else:
            self.state = PlannerState("starting", f"asking {config.coordinator_url} for the model's shape")
            self._weights = WeightCache(
                config.cache_dir, config.coordinator_url, config.cluster_token, self.stopping, "the planner's machine"
            )
            folder = self._weights.prepare()
        check_supported(read_config(folder))
        shape = read_model_shape(folder, self._config.context_length)
        check_wishes(shape, self._config)
        self.shape = shape

    def run(self) -> None:
        """Look at the machines again and again until `stopping`; goes on through Valkey's absences."""
        if self.shape is None:
            self.read_shape()
        away = False
        while not self.stopping.is_set():
            try:
                self._look()
                self._queue.put_planner_state(self.state)
                away = False
            except QueueUnavailable as error:
                if not away:
                    log.warning("can not look at the machines: %s", error)
                away = True
                if self.state.phase != "planned":  # a plan holds without Valkey too
                    self.state = PlannerState("waiting", str(error))
            self.stopping.wait(LOOK_SECONDS)

    def _look(self) -> None:
        assert self.shape is not None  # noqa: S101  # read_shape comes first, or the process has ended
        self.reports = self._queue.reports()
        self.plan = self._queue.plan()
        there = self._attendance.look(self.plan, self.reports, self._config.stage_count, time.monotonic())
        chosen = there.machines
        if strange := strangers_among(chosen, self.shape) or self_pointing_among(chosen):
            if self.state.detail != strange:
                log.error("no plan is possible: %s", strange)
            self.state = PlannerState("failed", strange)
            return
        holds = self.plan is not None and still_holds(self.plan, self.shape, chosen, self._config)
        if self.plan is not None and holds and (there.is_settled or self._config.split is not None or not chosen):
            self.state = PlannerState("planned", in_words(self.plan, there), self.plan.version)
            return
        if not holds and len(chosen) < self._config.stage_count:
            self.state = PlannerState("waiting", self._missing(chosen))
            return
        try:
            plan = partition(
                self.shape,
                chosen,
                self._config.split,
                version=0,
                kv_tokens=min(PLANNED_KV_TOKENS, self.shape.context_length),
                hop=ASSUMED_HOP,
                activation_dtype=self._config.activation_dtype,
                is_exact=self._config.quality == "exact",
            )
        except NoodleError as error:
            if holds and self.plan is not None:  # nothing is better without those that are gone
                detail = f"{in_words(self.plan, there)} No plan is possible without it: {error}"
                if self.state.detail != detail:
                    log.warning("%s", detail)
                self.state = PlannerState("planned", detail, self.plan.version)
                return
            if self.state.phase != "failed":
                log.error("no plan is possible: %s", error)
            self.state = PlannerState("failed", str(error))
            return
        if there.gone:
            log.warning("layers move away from stage %s", ", ".join(map(str, there.gone)))
        self.plan = msgspec.structs.replace(plan, version=self._queue.next_plan_version())
        self._queue.put_plan(self.plan)
        self.state = PlannerState("planned", self.plan.reason, self.plan.version)
        log.info("plan %d: %s", self.plan.version, self.plan.reason)

    def _missing(self, chosen: Sequence[MachineReport]) -> str:
        known = ", ".join(f"stage {report.stage_id} on {report.machine}" for report in chosen)
        return f"{len(chosen)} of {self._config.stage_count} stages have measured their machine ({known or 'none yet'})"


def in_words(plan: Plan, there: Attendance) -> str:
    """Why the plan is as it is, and who of it is not there."""
    said = dict.fromkeys(there.away, "is away") | dict.fromkeys(there.gone, "does not come back, or leaves")
    missing = [
        f"Stage {stage.stage_id} on {stage.machine} {said[stage.stage_id]}."
        for stage in plan.stages
        if stage.stage_id in said
    ]
    return " ".join([*missing, plan.reason])


def check_wishes(shape: ModelShape, config: PlannerConfig) -> None:
    """Raise ConfigurationError for wishes that no machine could fulfil, before any machine is measured."""
    if config.stage_count > shape.layer_count:
        raise ConfigurationError(
            f"{config.stage_count} stages were asked for, but the model has {shape.layer_count} layers.",
            cure=f"Ask for at most {shape.layer_count} stages.",
        )
    if config.split is not None and sum(config.split) != shape.layer_count:
        raise ConfigurationError(
            f"NOODLE_SPLIT={','.join(map(str, config.split))} adds up to {sum(config.split)} layers, "
            f"but the model has {shape.layer_count}.",
            cure="Change the split so that it adds up.",
        )


def strangers_among(reports: Sequence[MachineReport], shape: ModelShape) -> str:
    """Which stages run another noodle or have another model than this planner, and the cure; empty when none does."""
    for report in reports:
        who = f"Stage {report.stage_id} on {report.machine}"
        if report.noodle_version != __version__:
            return (
                f"{who} runs noodle {report.noodle_version}, and the planner {__version__}. Bring every machine to the "
                "same version, and start it again (with Docker: docker compose up --detach --build)."
            )
        if report.model_digest != shape.digest:
            return (
                f"{who} has other weights ({report.model_digest[:12]}) than the coordinator's model {shape.name} "
                f"({shape.digest[:12]}). Leave NOODLE_MODEL out there, so that its weights come from the coordinator, "
                "or set the same one, and start it again."
            )
    return ""


def self_pointing_among(reports: Sequence[MachineReport]) -> str:
    """Which stage sends the others to themselves, and the cure; empty when none does.

    On one host all may be at 127.0.0.1. One that is there while another is at an address of the network is not.
    """
    reasons = {report.stage_id: why_only_local(host_of(report.url)) for report in reports}
    if all(reasons.values()):
        return ""
    for report in reports:
        if reason := reasons[report.stage_id]:
            return (
                f"Stage {report.stage_id} on {report.machine} says that it is found at {report.url}, but {reason}. "
                "Set NOODLE_ADVERTISE_URL there to its machine's address, as http://192.168.1.102:8081 (with Docker: "
                "NOODLE_LAN_ADDRESS), and start it again."
            )
    return ""


def still_holds(plan: Plan, shape: ModelShape, reports: Sequence[MachineReport], config: PlannerConfig) -> bool:
    """Whether an existing plan suits these settings and no reporting stage contradicts it; absent ones do not."""
    if (plan.model_digest, plan.context_length) != (shape.digest, shape.context_length):
        return False
    if len(plan.stages) > config.stage_count:  # fewer are those that are left of them
        return False
    if config.split is not None and config.split != tuple(s.end_layer - s.start_layer for s in plan.stages):
        return False
    places = {stage.stage_id: _place(stage) for stage in plan.stages}
    return all(places.get(report.stage_id) == _place(report) for report in reports)


def _place(each: StageAssignment | MachineReport) -> tuple[str, ...]:
    """What of a stage a plan rests on."""
    return (each.url, each.machine, each.dtype, each.executor, each.weights, each.kv_dtype)
