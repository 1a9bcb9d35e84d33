"""The stage's routes; every one but the bare /health wants the cluster token."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.cluster.valkey import WorkQueue
from noodle.config.settings import StageConfig
from noodle.errors import Conflict, InvalidRequest
from noodle.metrics.scraped import service_registry
from noodle.threads import start_loop
from noodle.web import service
from noodle.web.connectivity import Target
from noodle.web.connectivity_routes import install_connectivity_routes
from noodle.wire.chunked import ChunkStream
from noodle.wire.hop_client import COORDINATOR_EPOCH_HEADER, PLAN_VERSION_HEADER
from noodle.wire.queue_end import STREAM_TIMEOUT_SECONDS
from services.stage.lifecycle import Lifecycle
from services.stage.manual.routes import guide_routes
from services.stage.metrics_sender import MetricsSender
from services.stage.stage import Stage
from services.stage.transport.hop_server import maximum_frame_bytes, unbuffered_read
from services.stage.transport.queued import TAKE_SECONDS, confirmed_by

STAGE_THREADS = 32  # a hop, readers of results and activations, and room for /health, /metrics and anonymous requests
STREAM_TYPE = "application/octet-stream"


def create_app(config: StageConfig, stage: Stage, lifecycle: Lifecycle, registry: CollectorRegistry) -> Flask:
    app = Flask("noodle.stage")
    service.install_error_handlers(app)
    service.install_metrics_route(app, registry, config.cluster_token)

    @app.get("/health")
    def health() -> Response:
        """Report the status; with the cluster token also the device, the plan and the room for KV rows."""
        state = lifecycle.state
        status = "starting" if state.phase in ("measuring", "loading") else state.phase
        answer: dict[str, Any] = {"service": "stage", "status": status}
        if service.has_token(config.cluster_token):  # without it, only that the stage is alive
            answer |= {
                "version": __version__,
                "stage_id": config.stage_id,
                "machine": config.machine,
                "detail": state.detail,
                "progress": state.progress or None,  # a stage that waits has none
                "state": state,
                "chain": stage.chain.links(),
            }
        return service.json_response(answer, 503 if state.phase == "failed" else 200)

    @app.post("/leave")
    def leave() -> Response:
        """Have this stage's layers moved to the other stages."""
        service.require_token(config.cluster_token)
        plan = lifecycle.leave()
        layers = None if plan is None or (index := plan.index_of(config.stage_id)) is None else plan.stages[index]
        return service.json_response({"stage_id": config.stage_id, "machine": config.machine, "layers": layers})

    @app.post("/hop")
    def hop() -> Response:
        """Take steps as a stream of frames; keep-alives stream back in the answer."""
        service.require_token(config.cluster_token)
        stage.refuse_connections()
        role = stage.ready_role(_whole_number(PLAN_VERSION_HEADER))
        if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise InvalidRequest("A hop is a stream of frames.", cure="Send it with Transfer-Encoding: chunked.")
        connection = service.streaming_connection()
        chunks = ChunkStream(connection.recv, connection.received_ahead())
        return _stream(stage.hops.serve(chunks.read, connection, maximum_frame_bytes(role.plan.hidden_size)))

    @app.get("/activations/<activation_id>")
    def activations(activation_id: str) -> Response:
        """Hand out hidden states that wait for the next stage, and free them when it has them."""
        service.require_token(config.cluster_token)
        body = stage.outbox.body(activation_id)
        is_chunked = request.headers.get("Transfer-Encoding", "").lower() == "chunked"
        read = unbuffered_read(request.environ["wsgi.input"])
        if "gunicorn.socket" in request.environ:
            # the fetcher confirms in its body after the answer: a stream, though a short one
            service.streaming_connection().settimeout(TAKE_SECONDS)
        delivery = stage.outbox.deliver(activation_id, body, confirmed_by(read, is_chunked))
        response = Response(delivery, mimetype=STREAM_TYPE)
        response.content_length = len(body)
        return response

    @app.get("/results")
    def results() -> Response:
        """Stream the last stage's results to the coordinator."""
        service.require_token(config.cluster_token)
        stage.refuse_connections()
        role = stage.ready_role(_whole_number(PLAN_VERSION_HEADER))
        if role.next_stage is not None:
            raise Conflict(f"Stage {config.stage_id} is not the last one of plan {role.plan.version}.")
        epoch = _whole_number(COORDINATOR_EPOCH_HEADER)
        if epoch < stage.worker.coordinator_epoch:
            raise Conflict(f"Coordinator epoch {epoch} is over: {stage.worker.coordinator_epoch} leads.")
        return _stream(stage.results.serve(service.streaming_connection()))

    app.register_blueprint(guide_routes(config, stage, lifecycle))
    install_connectivity_routes(
        app,
        token=config.cluster_token,
        valkey_password=config.valkey_password,
        name=f"stage {config.stage_id}",
        machine=config.machine,
        targets=lambda: (lifecycle.model_digest, _neighbours(config, stage)),
    )
    return app


def _neighbours(config: StageConfig, stage: Stage) -> list[Target]:
    """The services this stage talks to: the configured ones, and its neighbours in the plan."""
    targets = [Target("coordinator", config.coordinator_url), Target("valkey", config.valkey_url)]
    if (role := stage.role) is not None:
        neighbours = role.plan.stages[max(0, role.index - 1) : role.index + 2]
        targets += [
            Target(f"stage {each.stage_id}", each.url, each.machine)
            for each in neighbours
            if each.stage_id != config.stage_id
        ]
    return targets


class StageService(service.Service[StageConfig]):
    """A stage behind gunicorn."""

    name = "stage"
    threads = STAGE_THREADS

    def create_app(self) -> Flask:
        """Wire stage, lifecycle and routes, without importing torch."""
        registry, machine = service_registry(self.name, self.config.machine)
        streams = WorkQueue(self.config.valkey_url, self.config.valkey_password, STREAM_TIMEOUT_SECONDS)
        boot_id = uuid.uuid4().hex  # names this process, and so the KV cache that lives and dies with it
        self._stage = Stage(self.config, boot_id, registry, streams)
        machine.read_card = lambda: self._stage.read_card()
        self._sender = MetricsSender(self.config, boot_id, registry)
        self._stage.metrics.unsent_snapshots.set_function(lambda: len(self._sender.unsent))
        work_queue = WorkQueue(self.config.valkey_url, self.config.valkey_password)
        self._lifecycle = Lifecycle(self.config, self._stage, work_queue)
        return create_app(self.config, self._stage, self._lifecycle, registry)

    def start(self) -> None:
        start_loop("worker", self._stage.worker.run, self.name)
        self._stage.start_queue()
        start_loop("beat", self._lifecycle.beat, self.name)
        start_loop("plans", self._lifecycle.follow_plans, self.name)
        self._sender.start()

    def stop(self) -> None:
        self._sender.stopping.set()
        self._lifecycle.stop()
        self._stage.close()


def _stream(frames: Iterator[bytes]) -> Response:
    return Response(frames, mimetype=STREAM_TYPE, direct_passthrough=True)


def _whole_number(header: str) -> int:
    value = request.headers.get(header, "")
    if not value.isdigit() or len(value) > 16:
        raise InvalidRequest(f"The header {header} is {value[:40]!r}, not a whole number.", param=header)
    return int(value)
