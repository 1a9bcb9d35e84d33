"""Sends this stage's measurements to the coordinator's POST /log_metrics, each snapshot once.

A snapshot is on the disk before it is sent, and is removed when the coordinator has acknowledged it. One whose answer
is lost is sent again under the same id, which the coordinator knows. No fault here may ever fail the stage.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from noodle import __version__
from noodle.config.settings import StageConfig
from noodle.http_client import HTTP_ERRORS, message_of, reason_of, request

log = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 30.0  # between two
SEND_CONNECT_SECONDS = 3.0
SEND_ANSWER_SECONDS = 10.0
MAXIMUM_ANSWER_BYTES = 64 << 10  # of the coordinator to one request
SEND_ENTRIES = 200  # in one request; the coordinator takes 1000 and 1 MB
SEND_BYTES = 512 << 10
REFUSED_STATUSES = (400, 413, 415, 422)  # sending the same entries again would not help
UNSENT_BYTES = 4 << 20  # about two days of snapshots; then the oldest are dropped
DROPPED_SHARE = 0.25  # of UNSENT_BYTES at once, so that the file is not rewritten for each line
# The metrics in a snapshot, by their name in /metrics. Totals begin at 0 with each process (boot_id).
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

    def __init__(self, config: StageConfig, boot_id: str, registry: CollectorRegistry) -> None:
        self._config, self._boot_id, self._registry = config, boot_id, registry
        self.unsent = UnsentSnapshots(config.state_dir / f"unsent-metrics-stage-{config.stage_id}.jsonl")
        self._before: tuple[float, Mapping[str, float]] | None = None
        self._failure = ""
        self.stopping = threading.Event()

    def start(self) -> None:
        """Start the thread; not by start_loop, because the stage goes on without it."""
        threading.Thread(target=self.run, name="metrics", daemon=True).start()

    def run(self) -> None:
        """Measure and send until `stopping`; what an earlier process left unsent goes first."""
        while True:
            self.attempt(self.deliver)
            if self.stopping.wait(SNAPSHOT_SECONDS):
                return
            self.attempt(self.measure)

    def attempt(self, part: Callable[[], object]) -> None:
        """Call `measure` or `deliver`; a fault in it is logged and costs this turn only."""
        try:
            part()
        except Exception:
            log.exception("this stage's measurements cannot be kept or sent")

    def measure(self) -> None:
        """Take one snapshot and keep it to be sent."""
        now = time.monotonic()
        collected = (sample for family in self._registry.collect() for sample in family.samples)
        samples = {sample.name: sample.value for sample in collected if sample.name in SNAPSHOT_FIELDS}
        metrics: dict[str, Any] = {
            "measured_at_seconds": time.time(),
            "stage_id": self._config.stage_id,
            "boot_id": self._boot_id,
            "noodle_version": __version__,
            **{field: samples[name] for name, field in SNAPSHOT_FIELDS.items() if name in samples},
        }
        if self._before is not None:
            metrics |= rates_of(samples, self._before[1], now - self._before[0])
        self._before = (now, samples)
        self.unsent.add({"entry_id": uuid.uuid4().hex, "node_id": self._config.machine, "metrics": metrics})

    def deliver(self) -> None:
        """Send the unsent snapshots in order, until all are sent or the coordinator does not take them."""
        while chosen := self.unsent.oldest(SEND_ENTRIES, SEND_BYTES):
            try:
                status, answer = self._post(b"[" + b",".join(chosen) + b"]")
            except HTTP_ERRORS as error:
                self._log_failure(reason_of(error))
                return
            if status in REFUSED_STATUSES:
                log.warning("the coordinator refuses %d measurements: %d %s", len(chosen), status, answer)
            elif status != 200:
                self._log_failure(f"{status} {answer}")
                return
            self.unsent.remove(len(chosen))
        self._log_failure("")

    def _post(self, body: bytes) -> tuple[int, str]:
        answer = request(
            "POST",
            f"{self._config.coordinator_url}/log_metrics",
            token=self._config.cluster_token,
            body=body,
            headers={"Content-Type": "application/json"},
            connect_seconds=SEND_CONNECT_SECONDS,
            answer_seconds=SEND_ANSWER_SECONDS,
            maximum_bytes=MAXIMUM_ANSWER_BYTES,
        )
        return answer.status, message_of(answer.body)

    def _log_failure(self, failure: str) -> None:
        """Log the first of a row of failures, and its end (an empty text)."""
        if failure and not self._failure:
            url = self._config.coordinator_url
            log.info("%s does not take this stage's measurements, keeping them: %s", url, failure)
        elif self._failure and not failure:
            log.info("the coordinator takes this stage's measurements again")
        self._failure = failure


class UnsentSnapshots:
    """One bounded file of JSON lines, oldest first; used by one thread.

    Each line is whole or absent. Lines that cannot be written stay in memory, within the same bound, until they can.
    """

    def __init__(self, path: Path, maximum_bytes: int = UNSENT_BYTES) -> None:
        self._path, self._maximum_bytes = path, maximum_bytes
        self._lines: deque[bytes] = deque(_whole_lines(path))
        self._bytes = sum(map(len, self._lines))
        self._is_written = False  # whether the file holds exactly these lines: it may end in a torn one
        self._is_reported = False  # whether the current failure to write was logged

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, snapshot: Mapping[str, Any]) -> None:
        """Keep one snapshot; drops the oldest ones beyond the bound."""
        line = msgspec.json.encode(snapshot) + b"\n"
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes > self._maximum_bytes:
            self._drop_oldest()
        self._write(line if self._is_written else None)

    def oldest(self, maximum_count: int, maximum_bytes: int) -> list[bytes]:
        """Return the JSON of the oldest ones, at least one if there is any."""
        chosen: list[bytes] = []
        size = 0
        for line in self._lines:
            if chosen and (len(chosen) == maximum_count or size + len(line) > maximum_bytes):
                break
            chosen.append(line.rstrip(b"\n"))
            size += len(line)
        return chosen

    def remove(self, count: int) -> None:
        """Remove the oldest `count`: the coordinator has them."""
        for _ in range(count):
            self._bytes -= len(self._lines.popleft())
        self._write(None)

    def _drop_oldest(self) -> None:
        before = len(self._lines)
        while len(self._lines) > 1 and self._bytes > self._maximum_bytes * (1 - DROPPED_SHARE):
            self._bytes -= len(self._lines.popleft())
        self._is_written = False
        log.warning(
            "dropping the %d oldest measurements that the coordinator did not take: more than %d bytes wait",
            before - len(self._lines),
            self._maximum_bytes,
        )

    def _write(self, new_line: bytes | None) -> None:
        """Append one line, or rewrite the file; a failure is logged once, and the next call writes all lines."""
        try:
            if not self._lines:
                self._path.unlink(missing_ok=True)
            elif new_line is not None:
                _write_lines(self._path, "ab", [new_line])
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                part = self._path.with_name(self._path.name + ".part")
                _write_lines(part, "wb", self._lines)
                part.replace(self._path)
            self._is_written, self._is_reported = True, False
        except OSError as error:
            if not self._is_reported:
                log.warning(
                    "%s cannot be written (%s): unsent measurements are kept in memory only. "
                    "Free space, or set NOODLE_STATE_DIR to a folder that can be written.",
                    self._path,
                    error.strerror,
                )
            self._is_written, self._is_reported = False, True


def _write_lines(path: Path, mode: str, lines: list[bytes] | deque[bytes]) -> None:
    with path.open(mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that are JSON objects; a crash may have torn the last one."""
    try:
        data = path.read_bytes()
    except OSError:
        return []  # absent, or unreadable: the first write reports it
    whole: list[bytes] = []
    for line in data.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and isinstance(msgspec.json.decode(line), dict):
                whole.append(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.debug("skipping a damaged line in %s", path)
    return whole


def rates_of(now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """Rates since the previous snapshot, for people to read: they follow from the totals."""

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
