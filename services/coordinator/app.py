"""The coordinator's app: every module of routes, and what holds for all of them (ids, errors, origins, who may ask).

A route parses and checks everything that can be refused, asks the engine, and formats; only then does a stream open.
What happens in between is in generate.py. What each module adds here it also describes for /openapi.json.
"""

from __future__ import annotations

from flask import Flask, Response, g
from prometheus_client import CollectorRegistry

from noodle.config.settings import CoordinatorConfig
from noodle.logs import bind_request
from noodle.web.connectivity_routes import install_connectivity_routes
from noodle.web.service import install_error_handlers, install_metrics_route
from services.coordinator.api import about, generate, manual_schemas, openai, requests
from services.coordinator.api.auth import Clients, take_request_id
from services.coordinator.api.manual import guide_routes
from services.coordinator.api.openapi import METRICS, document, openapi_routes
from services.coordinator.coordinator import Coordinator
from services.coordinator.cors import install_cors
from services.coordinator.models.weight_server import install_weight_routes
from services.coordinator.ops import log_metrics, reports
from services.coordinator.ops.connectivity import OPERATIONS as REACH_OPERATIONS
from services.coordinator.ops.connectivity import reach_targets
from services.coordinator.ops.prometheus import install_targets_route

OPERATIONS = (
    *about.OPERATIONS,
    *openai.OPERATIONS,
    *generate.OPERATIONS,
    *requests.OPERATIONS,
    *manual_schemas.OPERATIONS,
    *log_metrics.OPERATIONS,
    *reports.OPERATIONS,
    *REACH_OPERATIONS,
    METRICS,
)


def create_app(config: CoordinatorConfig, engine: Coordinator, registry: CollectorRegistry) -> Flask:
    """The routes over an already wired engine."""
    app = Flask("noodle.coordinator")
    app.url_map.merge_slashes = False  # no answer of ours is a redirection
    install_error_handlers(app)
    install_metrics_route(app, registry, config.cluster_token)
    install_targets_route(app, config, engine)
    install_request_ids(app)
    install_cors(app, config.cors_origins)
    clients = Clients(config)
    app.register_blueprint(about.about_routes(config, engine, clients))
    app.register_blueprint(openai.openai_routes(config, engine, clients))
    app.register_blueprint(generate.generate_routes(config, engine, clients))
    app.register_blueprint(requests.request_routes(engine, clients))
    app.register_blueprint(guide_routes(config, engine, clients.require))
    app.register_blueprint(log_metrics.log_metrics_routes(config.metrics_file, clients.require))
    reports.install_report_routes(app, config.reports_dir, clients.require)
    install_weight_routes(app, engine.weights, config.cluster_token)
    install_connectivity_routes(
        app,
        token=config.cluster_token,
        valkey_password=config.valkey_password,
        name="coordinator",
        machine=config.machine,
        targets=lambda: reach_targets(config, engine),
    )
    app.register_blueprint(openapi_routes(document(OPERATIONS), clients))
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
