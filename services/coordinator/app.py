"""The coordinator's routes: parse and check everything that can be refused, only then open the stream.

A route parses, asks the engine, formats; what happens in between is in generate.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.config import CoordinatorConfig
from noodle.errors import NotAuthenticated
from noodle.metrics import install_metrics_route
from noodle.web import client_has_gone, has_token, install_error_handlers, json_body, json_response, require_token
from services.coordinator import event_streams, generate_format, openai_format
from services.coordinator.engine import Engine
from services.coordinator.leadership import progress_of, waiting_for
from services.coordinator.openai_request import parse_chat, parse_completion
from services.coordinator.parameters import GenerationParameters
from services.coordinator.weight_store import install_weight_routes

CLIENT_CLOSED_STATUS = 499  # nobody reads it; it is for the log
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def create_app(config: CoordinatorConfig, engine: Engine, registry: CollectorRegistry) -> Flask:
    """The routes over an already wired engine."""
    app = Flask("noodle.coordinator")
    install_error_handlers(app)
    install_metrics_route(app, registry, config.cluster_token)
    install_weight_routes(app, engine.weights, config.cluster_token)

    @app.before_request
    def give_an_id() -> None:
        asked = request.headers.get("X-Request-Id", "")
        g.request_id = asked if 0 < len(asked) <= 64 and asked.isascii() and asked.isprintable() else uuid.uuid4().hex

    @app.after_request
    def send_the_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    def require_client() -> None:
        """A key or the cluster token; on loopback without a key, a request that really is for this machine."""
        if config.api_key:
            require_token(config.api_key, config.cluster_token)
        elif request.host.rsplit(":", 1)[0] not in LOOPBACK_HOSTS:  # a web page that had its name point here
            raise NotAuthenticated(
                f"The request is for {request.host[:80]!r}, not for this machine.",
                cure="Use http://127.0.0.1, or set NOODLE_API_KEY.",
            )

    @app.get("/health")
    def health() -> Response:
        status, answer = health_of(engine)
        if config.api_key and not has_token(config.api_key, config.cluster_token):
            answer = {"service": "coordinator", "status": status}
        return json_response(answer, 503 if status == "failed" else 200)

    @app.get("/v1/models")
    def models() -> Response:
        require_client()
        return json_response(openai_format.model_list(engine.ready_model().served))

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        require_client()
        return json_response(openai_format.model_object(name, engine.ready_model().served))

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        require_client()
        loaded = engine.ready_model()
        asked = parse_chat(json_body(config.maximum_body_bytes), loaded.served)
        prompt = loaded.tokenizer.apply_chat_template(list(asked.messages))
        token_ids = engine.token_ids(prompt, add_special_tokens=False)
        shape = event_streams.CHAT
        return openai(shape, openai_format.new_chat_id(), token_ids, asked.parameters, "messages")

    @app.post("/v1/completions")
    def completions() -> Response:
        require_client()
        loaded = engine.ready_model()
        asked = parse_completion(json_body(config.maximum_body_bytes), loaded.served)
        token_ids = engine.token_ids(asked.prompt)
        shape = event_streams.COMPLETION
        return openai(shape, openai_format.new_completion_id(), token_ids, asked.parameters, "prompt")

    def openai(
        shape: event_streams.OpenAIShape,
        answer_id: str,
        token_ids: list[int],
        parameters: GenerationParameters,
        prompt_name: str,
    ) -> Response:
        started = engine.start(token_ids, parameters, prompt_name, goes_on=shape is event_streams.COMPLETION)
        model = engine.ready_model()
        head = openai_format.AnswerHead(
            answer_id, model.served.names[0], event_streams.now_seconds(), parameters.seed, parameters.include_usage
        )
        if parameters.stream:
            return event_stream(event_streams.openai_events(shape, head, started))
        return whole(started, lambda: event_streams.openai_answer(shape, head, started))

    @app.post("/generate")
    def generate() -> Response:
        return generated(stream=False)

    @app.post("/generate_stream")
    def generate_stream() -> Response:
        return generated(stream=True)

    def generated(*, stream: bool) -> Response:
        require_client()
        model = engine.ready_model()
        body = json_body(config.maximum_body_bytes)
        asked = generate_format.parse_generate(body, vocabulary_size=model.served.vocabulary_size, stream=stream)
        token_ids = engine.token_ids(asked.prompt)
        started = engine.start(token_ids, asked.parameters, "inputs")
        prompt_text = model.tokenizer.decode(token_ids) if asked.return_full_text else ""
        if stream:
            return event_stream(event_streams.generate_events(started, model.tokenizer, prompt_text))
        return whole(started, lambda: event_streams.generate_answer(started, model.tokenizer, prompt_text))

    return app


def whole(started: event_streams.Started, format_answer: Callable[[], Any]) -> Response:
    """Wait for the whole answer; a client that leaves meanwhile is not computed for."""
    if not started.answer.complete(client_has_gone):
        return Response(status=CLIENT_CLOSED_STATUS)
    return json_response(format_answer())


def event_stream(events: Iterator[bytes]) -> Response:
    """Server-sent events that nothing between here and the client may hold back."""
    response = Response(events, mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def health_of(engine: Engine) -> tuple[str, dict[str, Any]]:
    """Status and everything that /health says: what is being waited for, and who computes what."""
    view, leads, loop = engine.leadership.view, engine.leadership.leads, engine.loop.state
    up = loop.up and engine.loaded is not None
    waits = waiting_for(view, leads, loop.detail, loop.up) or ([] if up else [engine.detail])
    failed = engine.failure or next((state.detail for state in view.stages.values() if state.phase == "failed"), "")
    if not failed and view.planner is not None and view.planner.phase == "failed":
        failed = view.planner.detail
    status = "ready" if up else "failed" if failed else "starting"
    return status, {
        "service": "coordinator",
        "status": status,
        "version": __version__,
        "detail": failed or (waits[0] if waits else "ready"),
        "progress": progress_of(view, up),
        "waiting_for": waits,
        "model": engine.loaded.served.names[0] if engine.loaded else None,
        "plan": view.plan.version if view.plan else None,
        "plan_reason": view.plan.reason if view.plan else None,
        "context_length": loop.plan.context_length if loop.plan else None,
        "leads": leads,
        "stages": stages_of(engine),
    }


def stages_of(engine: Engine) -> list[dict[str, Any]]:
    """One line a stage: its layers by the plan, and what it says of itself."""
    view = engine.leadership.view
    assigned = {stage.stage_id: stage for stage in view.plan.stages} if view.plan else {}
    lines = []
    for stage_id in sorted(assigned.keys() | view.stages.keys()):
        line: dict[str, Any] = {"stage_id": stage_id}
        if (stage := assigned.get(stage_id)) is not None:
            line |= {
                "machine": stage.machine,
                "url": stage.url,
                "layers": [stage.start_layer, stage.end_layer],
                "dtype": stage.dtype,
            }
        state = view.stages.get(stage_id)
        line |= {"phase": "silent"} if state is None else {
            "phase": state.phase,
            "detail": state.detail,
            "progress": state.progress,
            "machine": state.machine,
            "weight_bytes": state.weight_bytes,
            "kv_bytes_held": state.kv_bytes_held,
            "kv_budget_bytes": state.kv_budget_bytes,
            "sessions": state.sessions,
        }  # fmt: skip
        lines.append(line)
    return lines
