"""The planner's routes: health for everyone, the plan and what it rests on for whoever has the cluster token."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response
from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.config import PlannerConfig
from noodle.metrics import install_metrics_route
from noodle.web import Service, has_token, install_error_handlers, json_response, require_token, start_loop
from noodle.work_queue import WorkQueue
from services.planner.planning import Planning

PLANNER_THREADS = 16


def create_app(config: PlannerConfig, planning: Planning, registry: CollectorRegistry) -> Flask:
    """The routes over an already wired planner."""
    app = Flask("noodle.planner")
    install_error_handlers(app)
    install_metrics_route(app, registry, config.cluster_token)

    @app.get("/health")
    def health() -> Response:
        state = planning.state
        status = {"planned": "ready"}.get(state.phase, state.phase)
        answer: dict[str, Any] = {"service": "planner", "status": status}
        if has_token(config.cluster_token):
            answer |= {"version": __version__, "detail": state.detail, "progress": None, "plan": state.plan_version}
        return json_response(answer, 503 if state.phase == "failed" else 200)

    @app.get("/plan")
    def plan() -> Response:
        require_token(config.cluster_token)
        return json_response({"plan": planning.plan, "model": planning.shape, "machines": planning.reports})

    return app


class PlannerService(Service):
    """The planner behind gunicorn."""

    name = "planner"
    threads = PLANNER_THREADS

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self.bind = config.bind
        self.log_format = config.log_format

    def create_app(self) -> Flask:
        """Read the model's shape and wire the routes; raises StartError for a model that is not run here."""
        work_queue = WorkQueue(self._config.valkey_url, self._config.valkey_password)
        self._planning = Planning(self._config, work_queue)
        if self._planning.has_folder:  # else it is asked for by the planner's own thread, and /health says so
            self._planning.read_shape()
        return create_app(self._config, self._planning, CollectorRegistry())

    def start(self) -> None:
        """Start looking at the machines."""
        start_loop("planning", self._planning.run, self.name)

    def stop(self) -> None:
        """Stop looking."""
        self._planning.stopping.set()
