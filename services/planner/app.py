"""The planner's routes and service. Everyone may read a bare /health; all else needs the cluster token."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Flask, Response
from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.cluster.valkey import WorkQueue
from noodle.config.settings import PlannerConfig
from noodle.errors import NotReady
from noodle.metrics.counted import PlannerMetrics
from noodle.metrics.scraped import PlanCollector, PlanSeen, service_registry
from noodle.threads import start_loop
from noodle.web.connectivity import Target
from noodle.web.connectivity_routes import install_connectivity_routes
from noodle.web.service import (
    Service,
    add_success_false,
    bounded_body,
    has_token,
    install_error_handlers,
    install_metrics_route,
    json_response,
    require_token,
)
from services.planner.node_list import parse_plan_request
from services.planner.planning import Planning, activation_dtype_of
from services.planner.prediction import planned_token_seconds
from services.planner.preview import preview

PREVIEW_BODY_BYTES = 256 << 10


def create_app(config: PlannerConfig, planning: Planning, registry: CollectorRegistry) -> Flask:
    app = Flask("noodle.planner")
    install_error_handlers(app)
    install_metrics_route(app, registry, config.cluster_token)

    @app.get("/health")
    def health() -> Response:
        """Report the status; with the cluster token also what the planner waits for."""
        state = planning.current_state
        status = {"planned": "ready"}.get(state.phase, state.phase)
        answer: dict[str, Any] = {"service": "planner", "status": status}
        if has_token(config.cluster_token):
            answer |= {"version": __version__, "detail": state.detail, "progress": None, "plan": state.plan_version}
        return json_response(answer, 503 if state.phase == "failed" else 200)

    @app.get("/plan")
    def plan() -> Response:
        """Return the plan, the model's shape and the reports of the machines behind it."""
        require_token(config.cluster_token)
        return json_response({"plan": planning.plan, "model": planning.shape, "machines": planning.reports})

    guide = Blueprint("guide", __name__)
    add_success_false(guide)

    @guide.post("/plan/preview")
    def plan_preview() -> Response:
        """Make a plan for a list of nodes, or for the registered machines, and keep none of it."""
        require_token(config.cluster_token)
        request, unused_fields = parse_plan_request(bounded_body(PREVIEW_BODY_BYTES))
        if planning.shape is None:
            raise NotReady("The planner is still reading the model's shape.", retry_after_seconds=1)
        machines = planning.reports if request.available_nodes is not None else planning.reports[: config.stage_count]
        status, answer = preview(
            request,
            planning.shape,
            machines,
            split=config.split if len(machines) == config.stage_count else None,  # it names every stage
            active=planning.plan,
            activation_dtype=activation_dtype_of(config),
        )
        return json_response({**answer, "not_used": unused_fields}, status)

    app.register_blueprint(guide)
    targets = [Target("coordinator", config.coordinator_url), Target("valkey", config.valkey_url)]
    install_connectivity_routes(
        app,
        token=config.cluster_token,
        valkey_password=config.valkey_password,
        name="planner",
        machine="",
        targets=lambda: (planning.shape.digest if planning.shape else "", targets),
    )
    return app


def watch(planning: Planning, wanted_stages: int, metrics: PlannerMetrics) -> None:
    """Show the planner's machines and plan in /metrics."""
    metrics.wanted_stages.set(wanted_stages)
    metrics.stages.set_function(lambda: len(planning.reports))
    metrics.machines.set_function(lambda: len({report.machine for report in planning.reports}))

    def seen() -> PlanSeen:
        if (plan := planning.plan) is None:
            return PlanSeen(0)
        return PlanSeen(plan.version, predicted_token_seconds=planned_token_seconds(plan))

    PlanCollector(metrics.registry, seen)


class PlannerService(Service[PlannerConfig]):
    """The planner behind gunicorn."""

    name = "planner"
    threads = 16

    def create_app(self) -> Flask:
        """Read the model's shape and wire the routes; raises StartError if noodle does not run the model."""
        work_queue = WorkQueue(self.config.valkey_url, self.config.valkey_password)
        self._planning = Planning(self.config, work_queue)
        if self._planning.has_model:  # otherwise the planner's thread fetches its headers, and /health shows it
            self._planning.read_shape()
        registry, _ = service_registry(self.name, self.config.machine)
        watch(self._planning, self.config.stage_count, PlannerMetrics(registry))
        return create_app(self.config, self._planning, registry)

    def start(self) -> None:
        start_loop("planning", self._planning.run, self.name)

    def stop(self) -> None:
        self._planning.stopping.set()
