"""`GET /prometheus/targets`: where Prometheus finds every /metrics of the cluster, as its HTTP service discovery asks.

A stage of the plan stays in the list while it is silent: that it does not answer is what one wants to see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, request

from noodle.cluster.plan import MachineReport, Plan
from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_response, require_token
from services.coordinator.coordinator import Coordinator

HTTP_PORT = 80

Target = dict[str, Any]


def install_targets_route(app: Flask, config: CoordinatorConfig, engine: Coordinator) -> None:
    """With the cluster token alone, as /metrics."""

    @app.get("/prometheus/targets")
    def prometheus_targets() -> Response:
        require_token(config.cluster_token)
        # whoever asks has reached the coordinator under this name: it knows no better one of itself
        own = _target(_with_port(request.host), service="coordinator", machine=config.machine)
        planner = _target(urlsplit(config.planner_url).netloc, service="planner")
        return json_response([own, planner, *stage_targets(engine.leadership.view.plan, engine.reports())])


def stage_targets(plan: Plan | None, reports: Iterable[MachineReport]) -> list[Target]:
    """Every stage that is registered or in the plan, by number; what it says of itself now holds before the plan."""
    planned = {stage.stage_id: (stage.url, stage.machine) for stage in plan.stages} if plan else {}
    registered = {report.stage_id: (report.url, report.machine) for report in reports}
    return [
        _target(urlsplit(url).netloc, service="stage", stage=str(stage_id), machine=machine)
        for stage_id, (url, machine) in sorted((planned | registered).items())
    ]


def _target(address: str, **labels: str) -> Target:
    return {"targets": [address], "labels": labels}


def _with_port(host: str) -> str:
    """As Prometheus wants it; a client leaves the port of HTTP out."""
    return host if host.rpartition(":")[2].isdigit() else f"{host}:{HTTP_PORT}"
