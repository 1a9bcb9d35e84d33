"""Whom the coordinator may try for `noodle doctor`: planner, Valkey, and the stages that are registered or planned."""

from __future__ import annotations

from noodle.cluster.plan import MachineReport
from noodle.config.settings import CoordinatorConfig
from noodle.web.connectivity import ConnectivityReport, Target
from services.coordinator.api.openapi import Operation
from services.coordinator.coordinator import Coordinator

OPERATIONS = (
    Operation(
        method="get",
        path="/doctor/reach",
        summary="Whom the coordinator reaches",
        description="Tries the planner, Valkey and the stages, and times each; requires the cluster token.",
        answer=ConnectivityReport,
        errors=(401, 429),
    ),
    Operation(
        method="get",
        path="/doctor/bytes",
        summary="Bytes to time a connection with",
        description="Sends `count` zero bytes; requires the cluster token.",
        answer={"type": "string"},
        errors=(400, 401),
        media_type="application/octet-stream",
    ),
)


def reach_targets(config: CoordinatorConfig, engine: Coordinator) -> tuple[str, list[Target]]:
    """The digest of the model by the plan, and whom to try; a stage that beats is tried where it says that it is."""
    plan = engine.leadership.view.plan
    stages = {
        stage.stage_id: Target(f"stage {stage.stage_id}", stage.url, stage.machine)
        for stage in (plan.stages if plan is not None else ())
    }
    stages |= {report.stage_id: _target(report) for report in engine.reports()}
    digest = plan.model_digest if plan is not None else ""
    targets = [Target("planner", config.planner_url), Target("valkey", config.valkey_url)]
    return digest, targets + [target for _, target in sorted(stages.items())]


def _target(report: MachineReport) -> Target:
    return Target(f"stage {report.stage_id}", report.url, report.machine, report.noodle_version, report.model_digest)
