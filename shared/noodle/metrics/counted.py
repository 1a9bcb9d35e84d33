"""Every metric that noodle counts, by service, in base units and with bounded labels (a stage, never a session).

Names end as vLLM's where the meaning is the same. The target's labels (GET /prometheus/targets) name the service and
machine of a sample; a label here names what a sample is about. Metrics that are read, not counted, are in scraped.py.
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
# Known label values start at 0, so that the first event is seen as an increase and an empty panel shows 0.
TRANSPORTS = ("direct", "queue")
REPLAY_REASONS = ("stage_restarted", "new_plan")
DROP_REASONS = ("old_plan_or_epoch", "next_stage_down", "no_reader_of_results")


class _Metrics:
    """Metrics of one registry; the values `known` of a label start at 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def _counter(self, name: str, text: str, *labels: str, known: Sequence[str] = ()) -> Counter:
        counter = Counter(name, text, labels, registry=self.registry)
        for value in known:
            counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class CoordinatorMetrics(_Metrics):
    """Metrics of the coordinator."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        text = "Requests by how they ended and the name of their API key."
        self.requests = self._counter("noodle_requests", text, "outcome", "key")
        self.running = self._gauge("noodle_num_requests_running", "Requests being computed.")
        self.waiting = self._gauge("noodle_num_requests_waiting", "Requests waiting for a place.")
        text = "Share of the smallest stage's room for KV rows that running and kept requests hold; 1 is all of it."
        self.kv_use = self._gauge("noodle_kv_cache_usage_perc", text)
        self.prompt_tokens = self._counter("noodle_prompt_tokens", "Prompt tokens received.")
        self.generated_tokens = self._counter("noodle_generation_tokens", "Tokens generated.")
        text = "From a request's arrival to its first token."
        self.time_to_first_token = self._histogram("noodle_time_to_first_token_seconds", text, REQUEST_SECONDS)
        text = "From a request's arrival to its end, of finished requests."
        self.request_seconds = self._histogram("noodle_e2e_request_latency_seconds", text, REQUEST_SECONDS)
        text = "Between two tokens of a request."
        self.inter_token = self._histogram("noodle_inter_token_latency_seconds", text, TOKEN_SECONDS)
        text = "Between two tokens of a request, time in which no stage computed the second one."
        self.token_overhead = self._histogram("noodle_token_overhead_seconds", text, OVERHEAD_SECONDS)
        text = "KV caches prefilled again."
        self.replays = self._counter("noodle_session_replays", text, "reason", known=REPLAY_REASONS)
        text = "Sessions that gave their KV rows to older ones and were prefilled again."
        self.preemptions = self._counter("noodle_preemptions", text)
        text = "Tokens of sessions to be prefilled."
        self.prefix_queries = self._counter("noodle_prefix_cache_queries", text)
        text = "Tokens of these whose KV rows existed already."
        self.prefix_hits = self._counter("noodle_prefix_cache_hits", text)
        text = "Tokens of ended requests whose KV rows are kept."
        self.kept_tokens = self._gauge("noodle_prefix_cache_tokens", text)
        self.travel = TravelMetrics(registry)
        self.steps = StepMetrics(registry)


@dataclass(frozen=True, slots=True)
class _StageSeries:
    """The series of one stage, looked up once a plan and not once a step."""

    compute: Histogram
    wait: Histogram
    send: Histogram
    token_compute: Counter
    token_wait: Counter
    token_send: Counter


class StepMetrics(_Metrics):
    """Where the time of steps and tokens went, by the durations in results; no clocks are compared."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        of_stage = ("stage", "machine")
        text = "Computation of one step on a stage."
        self._compute = self._histogram("noodle_stage_compute_seconds", text, STEP_SECONDS, *of_stage)
        text = "From a step's arrival on a stage to its computation."
        self._wait = self._histogram("noodle_stage_wait_seconds", text, STEP_SECONDS, *of_stage)
        text = "Sending a step to the next process, reported with the next step."
        self._send = self._histogram("noodle_stage_send_seconds", text, STEP_SECONDS, *of_stage)
        text = "A step's way from the coordinator to its result; of decode tokens alone, or with prompts in it."
        trip = self._histogram("noodle_step_seconds", text, STEP_SECONDS, "kind")
        self._trips = {True: trip.labels("decode"), False: trip.labels("prefill")}
        text = (
            "Between two tokens of a request, what a stage computed (compute), kept the step waiting (wait) or took to "
            "send it on (send). With noodle_token_hop_seconds it adds up to noodle_inter_token_latency_seconds."
        )
        self._token_parts = self._counter("noodle_token_stage_seconds", text, "part", *of_stage)
        text = "Between two tokens of a request, the rest: the network and the coordinator's own time."
        self._token_hop = self._counter("noodle_token_hop_seconds", text)
        self._stages: dict[int, _StageSeries] = {}

    def begin_plan(self, stages: Iterable[tuple[int, str]]) -> None:
        """Count the steps of these (stage, machine) from now on."""
        self._stages = {
            stage_id: _StageSeries(
                self._compute.labels(str(stage_id), machine),
                self._wait.labels(str(stage_id), machine),
                self._send.labels(str(stage_id), machine),
                *(self._token_parts.labels(part, str(stage_id), machine) for part in ("compute", "wait", "send")),
            )
            for stage_id, machine in stages
        }

    def count_step(
        self,
        timings: Sequence[StageTiming],
        trip_seconds: float,
        *,
        is_decode: bool,
        tokens: int,
        since_last_seconds: float,
    ) -> None:
        """Count one step.

        `tokens` of it are not the first of their request, and arrived `since_last_seconds` in sum after the previous
        one. The next stage may compute while the one before still returns from sending, so sending counts only the
        time that the other parts leave: the parts of a token's time always add up to it.
        """
        self._trips[is_decode].observe(trip_seconds)
        known = [(stage, timing) for timing in timings if (stage := self._stages.get(timing.stage_id)) is not None]
        for stage, timing in known:
            stage.compute.observe(timing.computed_seconds)
            stage.wait.observe(timing.waited_seconds)
            stage.send.observe(timing.sent_seconds)
        if not tokens:
            return
        computed_seconds = sum(timing.computed_seconds + timing.waited_seconds for _, timing in known)
        rest_seconds = max(0.0, since_last_seconds - tokens * computed_seconds)
        send_seconds = tokens * sum(timing.sent_seconds for _, timing in known)
        send_share = min(1.0, rest_seconds / send_seconds) if send_seconds else 0.0
        for stage, timing in known:
            stage.token_compute.inc(tokens * timing.computed_seconds)
            stage.token_wait.inc(tokens * timing.waited_seconds)
            stage.token_send.inc(tokens * timing.sent_seconds * send_share)
        self._token_hop.inc(max(0.0, rest_seconds - send_seconds * send_share))


class TravelMetrics(_Metrics):
    """Steps and results that one process sends."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.steps = self._counter("noodle_hop_steps", "Steps sent on.", "transport", known=TRANSPORTS)
        self.bytes = self._counter("noodle_hop_bytes", "Bytes of those steps.", "transport", known=TRANSPORTS)
        self.results = self._counter("noodle_hop_results", "Results sent.", "transport", known=TRANSPORTS)
        text = "A keep-alive to the next process and its echo, once a second; over a connection alone."
        self.round_trip = self._histogram("noodle_hop_round_trip_seconds", text, HOP_SECONDS)
        text = "Stream entries that were skipped."
        self.refused_entries = self._counter("noodle_queue_refused_entries", text, "reason")

    def step(self, transport: str, body_bytes: int) -> None:
        self.steps.labels(transport).inc()
        self.bytes.labels(transport).inc(body_bytes)


class StageMetrics(_Metrics):
    """Metrics of a stage."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.travel = TravelMetrics(registry)
        text = "Activations kept until the next stage fetches them."
        self.outbox_bytes = self._gauge("noodle_stage_outbox_bytes", text)
        self.steps = self._counter("noodle_stage_steps", "Steps computed.")
        self.tokens = self._counter("noodle_stage_tokens", "Tokens computed.")
        self.forward_tokens = self._counter("noodle_stage_forward_tokens", "Tokens computed in manual forwards.")
        text = "Spans that were outdated or refused."
        self.dropped_spans = self._counter("noodle_stage_dropped_spans", text, "reason", known=DROP_REASONS)
        self.refused_frames = self._counter("noodle_stage_refused_frames", "Frames refused.", "reason")
        self.kv_bytes = self._gauge("noodle_stage_kv_bytes", "Bytes of KV rows held.")
        text = "Bytes of KV rows that served requests may hold."
        self.kv_capacity_bytes = self._gauge("noodle_stage_kv_capacity_bytes", text)
        self.weight_bytes = self._gauge("noodle_stage_weight_bytes", "Bytes of the loaded layers.")
        self.sessions = self._gauge("noodle_stage_sessions", "Sessions with KV rows.")
        self.computed = self._histogram("noodle_stage_step_seconds", "Computation of one step.", STEP_SECONDS)
        text = "Metrics that wait until the coordinator takes them."
        self.unsent_snapshots = self._gauge("noodle_stage_unsent_snapshots", text)


class PlannerMetrics(_Metrics):
    """Metrics of the planner; `noodle_plan_*` are in scraped.py."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.machines = self._gauge("noodle_planner_machines", "Machines whose stages report.")
        self.stages = self._gauge("noodle_planner_stages", "Stages that report.")
        self.wanted_stages = self._gauge("noodle_planner_wanted_stages", "Stages that a plan needs.")
