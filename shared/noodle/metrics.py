"""Every metric of noodle, by service, in base units with bounded labels (a stage, never a session)."""

from __future__ import annotations

from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from noodle.web import require_token

TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
OVERHEAD_SECONDS = (0.0005, 0.00075, 0.001, 0.00125, 0.0015, 0.00175, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 1)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class CoordinatorMetrics:
    """What the coordinator counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "noodle_requests",
            "Requests by how they ended and the name of the key they came with.",
            ["outcome", "key"],
            registry=registry,
        )
        self.running = Gauge("noodle_requests_running", "Requests being computed.", registry=registry)
        self.waiting = Gauge("noodle_requests_waiting", "Requests waiting for a place.", registry=registry)
        self.prompt_tokens = Counter("noodle_prompt_tokens", "Prompt tokens taken in.", registry=registry)
        self.generated_tokens = Counter("noodle_generation_tokens", "Tokens generated.", registry=registry)
        self.time_to_first_token = Histogram(
            "noodle_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "noodle_inter_token_latency_seconds",
            "Between two tokens of a request.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.token_overhead = Histogram(
            "noodle_token_overhead_seconds",
            "Between two tokens of a request, what no stage computed for the second.",
            buckets=OVERHEAD_SECONDS,
            registry=registry,
        )
        self.replays = Counter("noodle_session_replays", "KV caches prefilled again.", ["reason"], registry=registry)
        self.preemptions = Counter(
            "noodle_preemptions",
            "Sessions that gave their KV rows to older ones and were prefilled again.",
            registry=registry,
        )
        self.prefix_queries = Counter(
            "noodle_prefix_cache_queries", "Tokens of sessions that were to be prefilled.", registry=registry
        )
        self.prefix_hits = Counter(
            "noodle_prefix_cache_hits", "Of these, tokens whose KV rows were there already.", registry=registry
        )
        self.kept_tokens = Gauge(
            "noodle_prefix_cache_tokens", "Tokens of ended requests whose KV rows are kept.", registry=registry
        )
        self.travel = TravelMetrics(registry)
        self.stage_computed = Histogram(
            "noodle_stage_computed_seconds",
            "Computation of one step on a stage.",
            ["stage"],
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self.stage_waited = Histogram(
            "noodle_stage_waited_seconds",
            "Of a step, from its arrival on a stage to its computation.",
            ["stage"],
            buckets=STEP_SECONDS,
            registry=registry,
        )


class TravelMetrics:
    """What one process counts of steps and results on their way; the sender counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter("noodle_hop_steps", "Steps sent on, by their way.", ["transport"], registry=registry)
        self.bytes = Counter("noodle_hop_bytes", "Bytes of those steps.", ["transport"], registry=registry)
        self.results = Counter("noodle_hop_results", "Results sent, by their way.", ["transport"], registry=registry)
        self.refused_entries = Counter(
            "noodle_queue_refused_entries", "Entries of a stream that were not taken.", ["reason"], registry=registry
        )

    def step(self, transport: str, body_bytes: int) -> None:
        """Count one step that was sent."""
        self.steps.labels(transport).inc()
        self.bytes.labels(transport).inc(body_bytes)


class StageMetrics:
    """What a stage counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.travel = TravelMetrics(registry)
        self.outbox_bytes = Gauge(
            "noodle_stage_outbox_bytes", "Activations kept until the next stage fetches them.", registry=registry
        )
        self.steps = Counter("noodle_stage_steps", "Steps computed.", registry=registry)
        self.tokens = Counter("noodle_stage_tokens", "Tokens computed.", registry=registry)
        self.forward_tokens = Counter(
            "noodle_stage_forward_tokens", "Tokens computed in forwards by hand.", registry=registry
        )
        self.dropped_spans = Counter(
            "noodle_stage_dropped_spans", "Spans that were old or refused.", ["reason"], registry=registry
        )
        self.refused_frames = Counter("noodle_stage_refused_frames", "Frames refused.", ["reason"], registry=registry)
        self.kv_bytes = Gauge("noodle_stage_kv_bytes", "Bytes of KV rows held.", registry=registry)
        self.sessions = Gauge("noodle_stage_sessions", "Sessions with KV rows.", registry=registry)
        self.computed = Histogram(
            "noodle_stage_step_seconds", "Computation of one step.", buckets=STEP_SECONDS, registry=registry
        )


def install_metrics_route(app: Flask, registry: CollectorRegistry, cluster_token: str) -> None:
    """`GET /metrics` for whoever has the cluster token."""

    @app.get("/metrics")
    def metrics() -> Response:
        require_token(cluster_token)
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)
