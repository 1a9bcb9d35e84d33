"""Sends what this stage measures of itself to the coordinator's POST /log_metrics, each snapshot once.

A snapshot is on the disk before it is sent, and leaves it when the coordinator has said that it has it; one whose
answer is lost is sent again under the same id, which the coordinator knows. Nothing here may ever fail the stage.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.config.settings import StageConfig
from services.stage.unsent_snapshots import JsonObject, UnsentSnapshots

log = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 30.0  # between two
SEND_CONNECT_SECONDS = 3.0
SEND_ANSWER_SECONDS = 10.0
SEND_ENTRIES = 200  # in one request; the coordinator takes 1000 and 1 MB
SEND_BYTES = 512 << 10
# Statuses that say that these entries will never be taken; with any other they may be later.
NEVER_TAKEN = (400, 413, 415, 422)
# Of /metrics what one wants to look back at: name there to name here. Totals begin at 0 with each process (boot_id).
SNAPSHOT_FIELDS = {
    "noodle_stage_steps_total": "steps",
    "noodle_stage_tokens_total": "tokens",
    "noodle_stage_step_seconds_sum": "compute_seconds",
    "noodle_hop_round_trip_seconds_sum": "round_trip_seconds",
    "noodle_hop_round_trip_seconds_count": "round_trips",
    "noodle_stage_kv_bytes": "kv_bytes",
    "noodle_stage_kv_capacity_bytes": "kv_capacity_bytes",
    "noodle_stage_weight_bytes": "weight_bytes",
    "noodle_stage_sessions": "sessions",
    "noodle_machine_cpu_busy_seconds_total": "machine_cpu_busy_seconds",
    "noodle_machine_cpu_cores": "machine_cpu_cores",
    "noodle_machine_memory_bytes": "machine_memory_bytes",
    "noodle_machine_memory_available_bytes": "machine_memory_available_bytes",
    "noodle_container_memory_bytes": "container_memory_bytes",
    "noodle_container_memory_limit_bytes": "container_memory_limit_bytes",
    "noodle_gpu_memory_bytes": "gpu_memory_bytes",
    "noodle_gpu_memory_free_bytes": "gpu_memory_free_bytes",
    "noodle_gpu_utilization_ratio": "gpu_utilization_ratio",
    "noodle_gpu_temperature_celsius": "gpu_temperature_celsius",
    "process_resident_memory_bytes": "process_memory_bytes",
    "process_cpu_seconds_total": "process_cpu_seconds",
}


class MetricsSender:
    """`run` is its thread."""

    def __init__(
        self, config: StageConfig, boot_id: str, registry: CollectorRegistry, unsent: UnsentSnapshots | None = None
    ) -> None:
        self._config, self._boot_id, self._registry = config, boot_id, registry
        path = config.state_dir / f"unsent-metrics-stage-{config.stage_id}.jsonl"
        self._unsent = UnsentSnapshots(path) if unsent is None else unsent
        self._before: tuple[float, Mapping[str, float]] | None = None
        self._failure = ""
        self.stopping = threading.Event()

    @property
    def unsent_count(self) -> int:
        """Snapshots that the coordinator has not taken."""
        return len(self._unsent)

    def start(self) -> None:
        """Not by start_loop: the stage goes on whatever becomes of this thread."""
        threading.Thread(target=self.run, name="metrics", daemon=True).start()

    def run(self) -> None:
        """Measure and send until `stopping`; what was left by the process before this one goes first."""
        while True:
            self.attempt(self.deliver)
            if self.stopping.wait(SNAPSHOT_SECONDS):
                return
            self.attempt(self.measure)

    def attempt(self, part: Callable[[], object]) -> None:
        """Do one of the two; a fault of ours costs this time only."""
        try:
            part()
        except Exception:
            log.exception("this stage's measurements can not be kept or sent")

    def measure(self) -> None:
        """Keep one snapshot."""
        now, samples = time.monotonic(), samples_of(self._registry)
        metrics: JsonObject = {
            "measured_at_seconds": time.time(),
            "stage_id": self._config.stage_id,
            "boot_id": self._boot_id,
            "noodle_version": __version__,
            **snapshot_of(samples),
        }
        if self._before is not None:
            metrics |= rates_of(samples, self._before[1], now - self._before[0])
        self._before = (now, samples)
        self._unsent.add({"entry_id": uuid.uuid4().hex, "node_id": self._config.machine, "metrics": metrics})

    def deliver(self) -> None:
        """Send what waits, in order, until it is gone or the coordinator does not take it."""
        while chosen := self._unsent.oldest(SEND_ENTRIES, SEND_BYTES):
            try:
                status, answer = self._post(b"[" + b",".join(chosen) + b"]")
            except (OSError, http.client.HTTPException) as error:
                self._say(str(error) or type(error).__name__)
                return
            if status in NEVER_TAKEN:
                log.warning("the coordinator refuses %d measurements: %d %s", len(chosen), status, answer)
            elif status != 200:
                self._say(f"{status} {answer}")
                return
            self._unsent.forget(len(chosen))
        self._say("")

    def _post(self, body: bytes) -> tuple[int, str]:
        parts = urlsplit(self._config.coordinator_url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=SEND_CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(SEND_ANSWER_SECONDS)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._config.cluster_token}"}
            connection.request("POST", f"{parts.path}/log_metrics", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(2000).decode("utf-8", "replace")
        finally:
            connection.close()

    def _say(self, failure: str) -> None:
        """Log when it begins and when it is over."""
        if failure and not self._failure:
            url = self._config.coordinator_url
            log.info("%s does not take this stage's measurements, they are kept: %s", url, failure)
        elif self._failure and not failure:
            log.info("the coordinator has taken this stage's measurements again")
        self._failure = failure


def samples_of(registry: CollectorRegistry) -> dict[str, float]:
    """What /metrics shows now, of those names that stand in a snapshot."""
    return {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name in SNAPSHOT_FIELDS
    }


def snapshot_of(samples: Mapping[str, float]) -> dict[str, Any]:
    """The fields that there are."""
    return {field: samples[name] for name, field in SNAPSHOT_FIELDS.items() if name in samples}


def rates_of(now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """What happened since the snapshot before: for people, the totals say the same."""

    def change(name: str) -> float:
        return now.get(name, 0.0) - before.get(name, 0.0)

    rates: dict[str, Any] = {
        "interval_seconds": round(seconds, 3),
        "tokens_per_second": change("noodle_stage_tokens_total") / seconds,
    }
    if steps := change("noodle_stage_steps_total"):
        rates["step_seconds"] = change("noodle_stage_step_seconds_sum") / steps
    if cores := now.get("noodle_machine_cpu_cores"):
        rates["machine_cpu_share"] = change("noodle_machine_cpu_busy_seconds_total") / (cores * seconds)
    return rates
