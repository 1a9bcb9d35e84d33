"""The coordinator behind gunicorn: its threads, and the order in which they stop."""

from __future__ import annotations

from flask import Flask

from noodle.config.settings import CoordinatorConfig
from noodle.metrics.counted import CoordinatorMetrics
from noodle.metrics.scraped import PlanCollector, service_registry
from noodle.threads import start_loop
from noodle.web.service import Service
from services.coordinator.app import create_app
from services.coordinator.coordinator import Coordinator

DRAIN_SECONDS = 5.0  # what open requests get to finish; gunicorn cuts after twice as long
SPARE_THREADS = 32  # beside the requests: /health, /metrics and those who get a 4xx


class CoordinatorService(Service):
    """Coordinator and routes."""

    name = "coordinator"

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self.bind = config.bind
        self.log_format = config.log_format
        self.threads = config.maximum_open_requests + config.maximum_waiting_requests + SPARE_THREADS

    def create_app(self) -> Flask:
        """Wire engine and routes; the model is fetched and loaded by a thread of its own."""
        registry, _ = service_registry(self.name, self._config.machine)
        self._engine = Coordinator(self._config, CoordinatorMetrics(registry))
        PlanCollector(registry, self._engine.plan_seen)
        return create_app(self._config, self._engine, registry)

    def start(self) -> None:
        """Start the loop, the lead, the recorder, and load the model's text side."""
        start_loop("generate", self._engine.loop.run, self.name)
        start_loop("recorder", self._engine.recorder.run, self.name)
        start_loop("leadership", self._engine.leadership.run, self.name)
        start_loop("model", self._engine.load, self.name)
        start_loop("resume", self._engine.resume_recorded, self.name)

    def stop(self) -> None:
        """Let open requests finish, end those that can not, give the lead away, write the last records."""
        self._engine.loop.drain(DRAIN_SECONDS)
        self._engine.loop.stop()
        self._engine.leadership.stop()
        self._engine.recorder.stop()
