"""`GET /prometheus/targets`: every /metrics of the cluster, for Prometheus' HTTP service discovery.

A stage of the plan stays in the list while it is silent, so that its silence shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from flask import Flask, Response, request
from msgspec import Struct

from noodle.cluster.plan import MachineReport, Plan
from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_response, require_token
from services.coordinator.api.openapi import Operation
from services.coordinator.coordinator import Coordinator


class ScrapeTarget(Struct):
    """One entry of Prometheus' HTTP service discovery."""

    targets: list[str]  # one host:port
    labels: dict[str, str]


OPERATIONS = (
    Operation(
        "GET /prometheus/targets",
        summary="Targets for Prometheus",
        description="Lists every /metrics of the cluster for Prometheus' HTTP service discovery; requires the cluster "
        "token.",
        answer=list[ScrapeTarget],
        errors=(401,),
    ),
)


def install_targets_route(app: Flask, config: CoordinatorConfig, coordinator: Coordinator) -> None:
    """Needs the cluster token, like /metrics."""

    @app.get("/prometheus/targets")
    def prometheus_targets() -> Response:
        require_token(config.cluster_token)
        # the client reached the coordinator under this name; the coordinator knows no better one. Prometheus needs a
        # port, which clients omit for HTTP
        host = request.host if request.host.rpartition(":")[2].isdigit() else f"{request.host}:80"
        own = _target(host, service="coordinator", machine=config.machine)
        planner = _target(urlsplit(config.planner_url).netloc, service="planner")
        return json_response([own, planner, *stage_targets(coordinator.leadership.view.plan, coordinator.reports())])


def stage_targets(plan: Plan | None, reports: Iterable[MachineReport]) -> list[ScrapeTarget]:
    """Every stage that is registered or planned, by number; its own report takes precedence over the plan."""
    planned = {stage.stage_id: (stage.url, stage.machine) for stage in plan.stages} if plan else {}
    registered = {report.stage_id: (report.url, report.machine) for report in reports}
    return [
        _target(urlsplit(url).netloc, service="stage", stage=str(stage_id), machine=machine)
        for stage_id, (url, machine) in sorted((planned | registered).items())
    ]


def _target(address: str, **labels: str) -> ScrapeTarget:
    return ScrapeTarget([address], labels)
