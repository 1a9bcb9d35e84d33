"""Every metric that noodle counts, by service, in base units with bounded labels (a stage, never a session).

Suffixes are vLLM's where the thing is the same. Which service and machine a sample comes from is said by the labels of
the target (GET /prometheus/targets); a label here names what a sample is about, where that is something else. What is
read and not counted stands in scraped_metrics.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from noodle.wire.messages import StageTiming

TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
OVERHEAD_SECONDS = (0.0005, 0.00075, 0.001, 0.00125, 0.0015, 0.00175, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 1)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
HOP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
# Those that are known beforehand begin at 0: a first one is seen as an increase, and a panel without any shows 0.
TRANSPORTS = ("direct", "queue")
REPLAY_REASONS = ("stage_restarted", "new_plan")
DROP_REASONS = ("old_plan_or_epoch", "next_stage_down", "no_reader_of_results")


class CoordinatorMetrics:
    """What the coordinator counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "noodle_requests",
            "Requests by how they ended and the name of the key they came with.",
            ["outcome", "key"],
            registry=registry,
        )
        self.running = Gauge("noodle_num_requests_running", "Requests being computed.", registry=registry)
        self.waiting = Gauge("noodle_num_requests_waiting", "Requests waiting for a place.", registry=registry)
        self.kv_use = Gauge(
            "noodle_kv_cache_usage_perc",
            "Of the tightest stage's room for KV rows, what running and kept requests hold; 1 is all of it.",
            registry=registry,
        )
        self.prompt_tokens = Counter("noodle_prompt_tokens", "Prompt tokens taken in.", registry=registry)
        self.generated_tokens = Counter("noodle_generation_tokens", "Tokens generated.", registry=registry)
        self.time_to_first_token = Histogram(
            "noodle_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "noodle_e2e_request_latency_seconds",
            "From a request's arrival to its end, of those that finished.",
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
        for reason in REPLAY_REASONS:
            self.replays.labels(reason)
        self.travel = TravelMetrics(registry)
        self.steps = StepMetrics(registry)


@dataclass(frozen=True, slots=True)
class _OfStage:
    """One stage's metrics, looked up once a plan and not once a step."""

    compute: Histogram
    wait: Histogram
    send: Histogram
    token_compute: Counter
    token_wait: Counter
    token_send: Counter


class StepMetrics:
    """Where the time of steps and tokens went, by the durations that results bring back; no clocks are compared."""

    def __init__(self, registry: CollectorRegistry) -> None:
        on_stage = ["stage", "machine"]

        def of_step(name: str, remark: str) -> Histogram:
            return Histogram(name, remark, on_stage, buckets=STEP_SECONDS, registry=registry)

        self._compute = of_step("noodle_stage_compute_seconds", "Computation of one step on a stage.")
        self._wait = of_step("noodle_stage_wait_seconds", "Of a step, from its arrival on a stage to its computation.")
        self._send = of_step("noodle_stage_send_seconds", "Handing a step to the next process, told with the next one.")
        self._trip = Histogram(
            "noodle_step_seconds",
            "A step's whole trip, from the coordinator to its result; of decode tokens alone, or with prompts in it.",
            ["kind"],
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self._trips = {True: self._trip.labels("decode"), False: self._trip.labels("prefill")}
        self._token_parts = Counter(
            "noodle_token_stage_seconds",
            "Between two tokens of a request, what a stage computed (compute), kept the step waiting (wait) or took to "
            "hand it on (send). With noodle_token_hop_seconds it adds up to noodle_inter_token_latency_seconds.",
            ["part", *on_stage],
            registry=registry,
        )
        self._token_hop = Counter(
            "noodle_token_hop_seconds",
            "Between two tokens of a request, the rest: the ways between processes, and the coordinator's own time.",
            registry=registry,
        )
        self._stages: dict[int, _OfStage] = {}

    def begin_plan(self, stages: Iterable[tuple[int, str]]) -> None:
        """These (stage, machine) compute from now on."""
        self._stages = {
            stage_id: _OfStage(
                self._compute.labels(str(stage_id), machine),
                self._wait.labels(str(stage_id), machine),
                self._send.labels(str(stage_id), machine),
                *(self._token_parts.labels(part, str(stage_id), machine) for part in ("compute", "wait", "send")),
            )
            for stage_id, machine in stages
        }

    def came_back(
        self,
        timings: Sequence[StageTiming],
        trip_seconds: float,
        *,
        is_decode: bool,
        tokens: int,
        since_last_seconds: float,
    ) -> None:
        """Count one step; `tokens` of it are not the first of their request, and came `since_last_seconds` in sum
        after the one before them.

        The next stage may compute already while the one before still returns from sending (its process was put aside):
        of sending counts what the others leave, so that the parts of a token's time always add up to it.
        """
        self._trips[is_decode].observe(trip_seconds)
        known = [(stage, timing) for timing in timings if (stage := self._stages.get(timing.stage_id)) is not None]
        for stage, timing in known:
            stage.compute.observe(timing.computed_seconds)
            stage.wait.observe(timing.waited_seconds)
            stage.send.observe(timing.sent_seconds)
        if not tokens:
            return
        there = sum(timing.computed_seconds + timing.waited_seconds for _, timing in known)
        rest_seconds = max(0.0, since_last_seconds - tokens * there)
        send_seconds = tokens * sum(timing.sent_seconds for _, timing in known)
        send_share = min(1.0, rest_seconds / send_seconds) if send_seconds else 0.0
        for stage, timing in known:
            stage.token_compute.inc(tokens * timing.computed_seconds)
            stage.token_wait.inc(tokens * timing.waited_seconds)
            stage.token_send.inc(tokens * timing.sent_seconds * send_share)
        self._token_hop.inc(max(0.0, rest_seconds - send_seconds * send_share))


class TravelMetrics:
    """What one process counts of steps and results on their way; the sender counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter("noodle_hop_steps", "Steps sent on, by their way.", ["transport"], registry=registry)
        self.bytes = Counter("noodle_hop_bytes", "Bytes of those steps.", ["transport"], registry=registry)
        self.results = Counter("noodle_hop_results", "Results sent, by their way.", ["transport"], registry=registry)
        self.round_trip = Histogram(
            "noodle_hop_round_trip_seconds",
            "A keep-alive to the next process and its echo, once a second; over a connection alone.",
            buckets=HOP_SECONDS,
            registry=registry,
        )
        self.refused_entries = Counter(
            "noodle_queue_refused_entries", "Entries of a stream that were not taken.", ["reason"], registry=registry
        )
        for transport in TRANSPORTS:
            self.steps.labels(transport)
            self.bytes.labels(transport)
            self.results.labels(transport)

    def step(self, transport: str, body_bytes: int) -> None:
        """Count one step that was sent."""
        self.steps.labels(transport).inc()
        self.bytes.labels(transport).inc(body_bytes)


class StageMetrics:
    """What a stage counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
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
        for reason in DROP_REASONS:
            self.dropped_spans.labels(reason)
        self.refused_frames = Counter("noodle_stage_refused_frames", "Frames refused.", ["reason"], registry=registry)
        self.kv_bytes = Gauge("noodle_stage_kv_bytes", "Bytes of KV rows held.", registry=registry)
        self.kv_capacity_bytes = Gauge(
            "noodle_stage_kv_capacity_bytes", "Bytes of KV rows that served requests may hold.", registry=registry
        )
        self.weight_bytes = Gauge("noodle_stage_weight_bytes", "Bytes of the loaded layers.", registry=registry)
        self.sessions = Gauge("noodle_stage_sessions", "Sessions with KV rows.", registry=registry)
        self.computed = Histogram(
            "noodle_stage_step_seconds", "Computation of one step.", buckets=STEP_SECONDS, registry=registry
        )
        self.unsent_snapshots = Gauge(
            "noodle_stage_unsent_snapshots", "Metrics that wait until the coordinator takes them.", registry=registry
        )


class PlannerMetrics:
    """What the planner counts; `noodle_plan_*` is scraped_metrics.py's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.machines = Gauge("noodle_planner_machines", "Machines whose stages report.", registry=registry)
        self.stages = Gauge("noodle_planner_stages", "Stages that report.", registry=registry)
        self.wanted_stages = Gauge("noodle_planner_wanted_stages", "Stages that a plan needs.", registry=registry)
