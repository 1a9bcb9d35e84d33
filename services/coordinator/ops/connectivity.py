"""What the coordinator tries to reach for `noodle doctor`: planner, Valkey, and registered or planned stages."""

from __future__ import annotations

from noodle.config.settings import CoordinatorConfig
from noodle.web.connectivity import ConnectivityReport, Target
from services.coordinator.api.openapi import Operation
from services.coordinator.coordinator import Coordinator

OPERATIONS = (
    Operation(
        "GET /doctor/reach",
        summary="What the coordinator reaches",
        description="Tries the planner, Valkey and the stages, and times each; requires the cluster token.",
        answer=ConnectivityReport,
        errors=(401, 429),
    ),
    Operation(
        "GET /doctor/bytes",
        summary="Bytes to time a connection with",
        description="Sends `count` zero bytes; requires the cluster token.",
        answer={"type": "string"},
        errors=(400, 401),
        media_type="application/octet-stream",
    ),
)


def reachable_targets(config: CoordinatorConfig, coordinator: Coordinator) -> tuple[str, list[Target]]:
    """The model's digest by the plan, and the targets; a stage's own report takes precedence over the plan."""
    plan = coordinator.leadership.view.plan
    stages = {
        stage.stage_id: Target(f"stage {stage.stage_id}", stage.url, stage.machine)
        for stage in (plan.stages if plan is not None else ())
    }
    for report in coordinator.reports():
        known = (report.url, report.machine, report.noodle_version, report.model_digest)
        stages[report.stage_id] = Target(f"stage {report.stage_id}", *known)
    services = [Target("planner", config.planner_url), Target("valkey", config.valkey_url)]
    return plan.model_digest if plan is not None else "", services + [target for _, target in sorted(stages.items())]
