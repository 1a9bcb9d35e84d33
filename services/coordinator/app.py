"""The coordinator's app: all modules of routes, and what holds for each of them: ids, errors, origins.

A route parses and checks everything that can be refused, asks the coordinator, and formats; only then a stream opens.
"""

from __future__ import annotations

from flask import Flask, Response, g
from prometheus_client import CollectorRegistry

from noodle.config.settings import CoordinatorConfig
from noodle.logs import bind_request
from noodle.web.connectivity_routes import install_connectivity_routes
from noodle.web.service import install_error_handlers, install_metrics_route
from services.coordinator.api import generate, manual, openai, openapi, requests
from services.coordinator.api.auth import Clients, take_request_id
from services.coordinator.api.body import JsonObject
from services.coordinator.api.openapi import ANY_OBJECT, Operation
from services.coordinator.coordinator import Coordinator
from services.coordinator.cors import install_cors
from services.coordinator.models.weight_server import install_weight_routes
from services.coordinator.ops import connectivity, health, log_metrics, prometheus, reports

WEIGHT_OPERATIONS = (
    Operation(
        method="get",
        path="/weights",
        summary="The model's files",
        description="Lists the byte range and digest of each tensor; requires the cluster token.",
        answer=ANY_OBJECT,
        errors=(401, 503),
    ),
    Operation(
        method="get",
        path="/weights/files/{name}",
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
    """The routes of an already wired coordinator."""
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
    app.register_blueprint(openapi.openapi_routes(document(), clients))
    return app


def install_request_ids(app: Flask) -> None:
    """Every request has an id: in its answer, and in every log line about it."""

    @app.before_request
    def give_an_id() -> None:
        bind_request(take_request_id())

    @app.after_request
    def send_the_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    @app.teardown_request
    def forget_the_id(_error: BaseException | None) -> None:
        bind_request("")  # the thread serves another one next
