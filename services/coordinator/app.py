"""The coordinator as a service: all modules of routes, what holds for each of them, and its threads.

A route parses and checks everything that can be refused, asks the coordinator, and formats; only then a stream opens.
"""

from __future__ import annotations

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry

from noodle.config.settings import CoordinatorConfig
from noodle.logs import bind_request
from noodle.metrics.counted import CoordinatorMetrics
from noodle.metrics.scraped import PlanCollector, service_registry
from noodle.threads import start_loop
from noodle.web.connectivity_routes import install_connectivity_routes
from noodle.web.service import Service, install_error_handlers, install_metrics_route, json_response
from services.coordinator.api import generate, manual, openai, openapi, requests
from services.coordinator.api.auth import Clients, take_request_id
from services.coordinator.api.body import JsonObject
from services.coordinator.api.openapi import ANY_OBJECT, Operation
from services.coordinator.coordinator import Coordinator
from services.coordinator.models.weight_server import install_weight_routes
from services.coordinator.ops import connectivity, health, log_metrics, prometheus, reports

DRAIN_SECONDS = 5.0  # for open requests to finish; gunicorn cuts after twice as long
SPARE_THREADS = 32  # beside the requests: /health, /metrics and refusals
PREFLIGHT_SECONDS = 600  # for which a browser may keep the answer to a preflight
ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-Id"
EXPOSED_HEADERS = "X-Request-Id, Retry-After"

WEIGHT_OPERATIONS = (
    Operation(
        "GET /weights",
        summary="The model's files",
        description="Lists the byte range and digest of each tensor; requires the cluster token.",
        answer=ANY_OBJECT,
        errors=(401, 503),
    ),
    Operation(
        "GET /weights/files/{name}",
        summary="One range of a file of the model",
        description="Sends the bytes of the `Range`; requires the cluster token.",
        errors=(400, 401, 404, 503),
        other_answers={206: ("The bytes.", {"type": "string"})},
    ),
)
OPERATIONS = (
    *health.OPERATIONS,
    *openai.OPERATIONS,
    *generate.OPERATIONS,
    *requests.OPERATIONS,
    *manual.OPERATIONS,
    *log_metrics.OPERATIONS,
    *reports.OPERATIONS,
    *prometheus.OPERATIONS,
    *WEIGHT_OPERATIONS,
    *connectivity.OPERATIONS,
    openapi.METRICS,
    openapi.OPENAPI,
)


def document() -> JsonObject:
    """The OpenAPI document of all routes; needs no running cluster."""
    return openapi.describe(OPERATIONS)


def create_app(config: CoordinatorConfig, coordinator: Coordinator, registry: CollectorRegistry) -> Flask:
    app = Flask("noodle.coordinator")
    app.url_map.merge_slashes = False  # no answer of ours is a redirection
    install_error_handlers(app)
    install_metrics_route(app, registry, config.cluster_token)
    prometheus.install_targets_route(app, config, coordinator)
    install_request_ids(app)
    install_cors(app, config.cors_origins)
    clients = Clients(config)
    app.register_blueprint(health.health_routes(config, coordinator, clients))
    app.register_blueprint(openai.openai_routes(config, coordinator, clients))
    app.register_blueprint(generate.generate_routes(config, coordinator, clients))
    app.register_blueprint(requests.request_routes(coordinator, clients))
    app.register_blueprint(manual.guide_routes(config, coordinator, clients))
    app.register_blueprint(log_metrics.log_metrics_routes(config.metrics_file, clients.require))
    reports.install_report_routes(app, config.reports_dir, clients.require)
    install_weight_routes(app, coordinator.weights, config.cluster_token)
    install_connectivity_routes(
        app,
        token=config.cluster_token,
        valkey_password=config.valkey_password,
        name="coordinator",
        machine=config.machine,
        targets=lambda: connectivity.reachable_targets(config, coordinator),
    )
    described = document()

    @app.get("/openapi.json")
    def openapi_json() -> Response:
        clients.require()
        return json_response(described)

    return app


def install_request_ids(app: Flask) -> None:
    """Give every request an id, for its answer and for every log line about it."""

    @app.before_request
    def give_id() -> None:
        bind_request(take_request_id())

    @app.after_request
    def send_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    @app.teardown_request
    def forget_id(_error: BaseException | None) -> None:
        bind_request("")  # the thread serves another request next


def install_cors(app: Flask, origins: tuple[str, ...]) -> None:
    """Let web pages of these origins read answers, without cookies: a page sends its key itself."""
    if not origins:
        return

    @app.before_request
    def preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        return Response(status=204)  # `mark` adds what is allowed, for these origins alone

    @app.after_request
    def mark(response: Response) -> Response:
        response.vary.add("Origin")
        origin = request.headers.get("Origin", "")
        if not origin or (origin not in origins and "*" not in origins):
            return response
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
            response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response


class CoordinatorService(Service[CoordinatorConfig]):
    """The coordinator behind gunicorn: its threads, and the order in which they stop."""

    name = "coordinator"

    def __init__(self, config: CoordinatorConfig) -> None:
        super().__init__(config)
        self.threads = config.maximum_open_requests + config.maximum_waiting_requests + SPARE_THREADS

    def create_app(self) -> Flask:
        """Wire coordinator and routes; a thread of its own fetches and loads the model."""
        registry, _ = service_registry(self.name, self.config.machine)
        self._coordinator = Coordinator(self.config, CoordinatorMetrics(registry))
        PlanCollector(registry, self._coordinator.plan_seen)
        return create_app(self.config, self._coordinator, registry)

    def start(self) -> None:
        start_loop("generate", self._coordinator.loop.run, self.name)
        start_loop("recorder", self._coordinator.recorder.run, self.name)
        start_loop("leadership", self._coordinator.leadership.run, self.name)
        start_loop("model", self._coordinator.load, self.name)
        start_loop("resume", self._coordinator.resume_recorded, self.name)

    def stop(self) -> None:
        """Let open requests finish, end the others, give the lead away, write the last records."""
        self._coordinator.loop.drain(DRAIN_SECONDS)
        self._coordinator.loop.stop()
        self._coordinator.leadership.stop()
        self._coordinator.recorder.stop()
