"""Measurements of a stage reach the coordinator once, through cuts, lost answers and restarts."""

import http.server
import json
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from noodle.config.environment import stage_config
from noodle.metrics.counted import StageMetrics
from noodle.metrics.scraped import service_registry
from services.coordinator.ops.log_metrics import METRICS_FILE_BYTES, MetricsEntry, parse_metrics
from services.coordinator.ops.records import RecordStore
from services.stage import metrics_sender
from services.stage.metrics_sender import MetricsSender, UnsentSnapshots, rates_of

TOKEN = "a-token-of-some-length"
WAIT_SECONDS = 10.0


class Coordinator:
    """POST /log_metrics over the coordinator's own file, with faults: `fault` is taken by the next request."""

    def __init__(self, path):
        self.path, self.file = path, RecordStore(path, METRICS_FILE_BYTES)
        self.fault = ""
        self.asked = 0
        coordinator = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                coordinator.asked += 1
                fault, coordinator.fault = coordinator.fault, ""
                length = int(self.headers["Content-Length"])
                if fault == "cut in the body":
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    return
                body = self.rfile.read(length)
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
                assert self.path == "/log_metrics"
                if fault.isdigit():
                    self.send_error(int(fault))
                    return
                coordinator.file.append(parse_metrics(body, time.time()))
                self.close_connection = True
                if fault != "answer lost":
                    self.send_response(200)
                    self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def restart(self):
        """Forget everything but the file, as a new process."""
        self.file = RecordStore(self.path, METRICS_FILE_BYTES)

    def numbers(self):
        """The numbers of the stage's snapshots, in the order they were kept."""
        return [metrics["number"] for metrics in self.metrics()]

    def metrics(self):
        """What the stage measured, in the order it was stored."""
        return [entry.metrics for entry in self.file.newest(MetricsEntry, 1000)][::-1]

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def coordinator(tmp_path):
    running = Coordinator(tmp_path / "a" / "metrics.jsonl")
    yield running
    running.close()


class Stage:
    """A sender whose snapshots are numbers; `restart` is a new process over the same folder."""

    def __init__(self, coordinator, tmp_path):
        self.options = {
            "NOODLE_CLUSTER_TOKEN": TOKEN,
            "NOODLE_COORDINATOR_URL": coordinator.url,
            "NOODLE_STATE_DIR": str(tmp_path / "b"),
            "NOODLE_STAGE_ID": "1",
            "NOODLE_MACHINE": "machine-b",
        }
        self.number = 0
        self.restart()

    def restart(self):
        self.config = stage_config(self.options)
        self.sender = MetricsSender(self.config, "boot", CollectorRegistry())

    def measure(self, count=1):
        for _ in range(count):
            entry = {"entry_id": f"{self.number:032x}", "node_id": "machine-b", "metrics": {"number": self.number}}
            self.sender.unsent.add(entry)
            self.number += 1

    @property
    def path(self):
        return self.config.state_dir / "unsent-metrics-stage-1.jsonl"


@pytest.fixture
def stage(coordinator, tmp_path):
    return Stage(coordinator, tmp_path)


def test_what_is_taken_leaves_nothing_behind(stage, coordinator):
    stage.measure(3)
    assert len(stage.path.read_bytes().splitlines()) == 3
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1, 2]
    assert not stage.path.exists()
    assert len(stage.sender.unsent) == 0


@pytest.mark.parametrize("fault", ["cut in the body", "answer lost", "500", "503", "401", "404"])
def test_a_snapshot_that_was_not_acknowledged_is_sent_again_and_kept_once(stage, coordinator, fault):
    stage.measure(2)
    coordinator.fault = fault
    stage.sender.deliver()
    assert len(stage.sender.unsent) == 2
    stage.measure()
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1, 2]
    assert len(stage.sender.unsent) == 0


@pytest.mark.parametrize("restarted", ["stage", "coordinator", "both"])
def test_a_lost_answer_and_a_restart_lose_and_double_nothing(stage, coordinator, restarted):
    stage.measure(2)
    coordinator.fault = "answer lost"
    stage.sender.deliver()
    if restarted != "stage":
        coordinator.restart()
    if restarted != "coordinator":
        stage.restart()
    stage.measure()
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1, 2]


def test_many_that_wait_go_in_several_requests_and_a_cut_between_them_loses_none(stage, coordinator, monkeypatch):
    monkeypatch.setattr(metrics_sender, "SEND_ENTRIES", 10)
    stage.measure(35)
    coordinator.fault = "answer lost"
    stage.sender.deliver()
    coordinator.restart()
    stage.restart()
    stage.sender.deliver()
    assert coordinator.numbers() == list(range(35))
    assert coordinator.asked == 5


def test_refused_snapshots_do_not_block_the_rest(stage, coordinator, caplog):
    stage.measure()
    coordinator.fault = "413"
    stage.sender.deliver()
    assert "refuses 1 measurements: 413" in caplog.text
    stage.measure()
    stage.sender.deliver()
    assert coordinator.numbers() == [1]


def test_an_unreachable_coordinator_costs_one_log_line(stage, coordinator, caplog):
    caplog.set_level("INFO")
    stage.options["NOODLE_COORDINATOR_URL"] = "http://127.0.0.1:1"
    stage.restart()
    stage.measure(2)
    stage.sender.deliver()
    stage.sender.deliver()
    assert caplog.text.count("does not take this stage's measurements") == 1
    stage.options["NOODLE_COORDINATOR_URL"] = coordinator.url
    stage.restart()
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1]


def test_a_line_torn_by_a_crash_is_skipped(stage, coordinator):
    stage.measure(2)
    with stage.path.open("ab") as file:
        file.write(b'{"entry_id": "torn", "node_')
    stage.restart()
    stage.measure()
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1, 2]


def test_beyond_the_bound_the_oldest_are_dropped_with_a_warning(tmp_path, caplog):
    unsent = UnsentSnapshots(tmp_path / "file.jsonl", maximum_bytes=2000)
    for number in range(200):
        unsent.add({"number": number})
        assert (tmp_path / "file.jsonl").stat().st_size <= 2000
    numbers = [json.loads(line)["number"] for line in unsent.oldest(1000, 1 << 20)]
    assert numbers == list(range(200 - len(numbers), 200))
    assert len(numbers) > 50
    assert "dropping the" in caplog.text
    assert len(UnsentSnapshots(tmp_path / "file.jsonl")) == len(numbers)


def test_an_unwritable_folder_is_logged_once_and_snapshots_are_sent_from_memory(tmp_path, coordinator, caplog):
    (tmp_path / "in the way").write_text("")
    stage = Stage(coordinator, tmp_path)
    stage.options["NOODLE_STATE_DIR"] = str(tmp_path / "in the way")
    stage.restart()
    stage.measure(3)
    assert caplog.text.count("NOODLE_STATE_DIR") == 1
    stage.sender.deliver()
    assert coordinator.numbers() == [0, 1, 2]


def test_a_batch_is_bounded_in_bytes_but_never_empty(tmp_path):
    unsent = UnsentSnapshots(tmp_path / "file.jsonl")
    unsent.add({"text": "x" * 1000})
    unsent.add({"text": "y"})
    assert len(unsent.oldest(10, 500)) == 1
    unsent.remove(1)
    assert unsent.oldest(10, 500) == [b'{"text":"y"}']


def test_a_fault_in_measuring_does_not_end_the_stage(stage, caplog):
    def broken():
        raise ZeroDivisionError

    stage.sender.attempt(broken)
    assert "cannot be kept or sent" in caplog.text


def test_a_snapshot_says_what_the_machine_and_the_stage_did(stage, coordinator):
    registry, _ = service_registry("stage", "machine-b")
    metrics = StageMetrics(registry)
    sender = MetricsSender(stage.config, "boot", registry)
    sender.measure()
    metrics.steps.inc(4)
    metrics.tokens.inc(40)
    metrics.computed.observe(0.5)
    sender.measure()
    sender.deliver()
    first, second = coordinator.metrics()
    assert coordinator.file.newest(MetricsEntry, 1)[0].node_id == "machine-b"
    assert "tokens_per_second" not in first
    assert (second["stage_id"], second["steps"], second["tokens"]) == (1, 4.0, 40.0)
    assert second["step_seconds"] == pytest.approx(0.125)
    assert second["tokens_per_second"] > 0
    assert second["machine_memory_bytes"] > second["machine_memory_available_bytes"] > 0
    assert second["measured_at_seconds"] > 1e9


def test_rates_are_of_the_time_between_two_snapshots():
    before = {"noodle_stage_tokens_total": 10.0, "noodle_machine_cpu_busy_seconds_total": 100.0}
    now = {
        "noodle_stage_tokens_total": 70.0,
        "noodle_machine_cpu_busy_seconds_total": 130.0,
        "noodle_machine_cpu_cores": 2.0,
    }
    rates = rates_of(now, before, 30.0)
    assert rates == {"interval_seconds": 30.0, "tokens_per_second": 2.0, "machine_cpu_share": 0.5}


def test_the_thread_sends_what_was_left_and_measures_until_it_is_stopped(stage, coordinator, monkeypatch):
    monkeypatch.setattr(metrics_sender, "SNAPSHOT_SECONDS", 0.02)
    stage.measure(2)
    thread = threading.Thread(target=stage.sender.run)
    thread.start()
    for _ in range(1000):
        if len(coordinator.metrics()) >= 4:
            break
        thread.join(0.01)
    stage.sender.stopping.set()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    assert [metrics.get("number") for metrics in coordinator.metrics()][:2] == [0, 1]
    assert coordinator.metrics()[-1]["boot_id"] == "boot"


def test_snapshots_stay_on_the_stage_while_the_coordinator_cannot_write_its_file(stage, coordinator, monkeypatch):
    stage.measure()

    def full(entries):
        raise OSError("the disk is full")

    monkeypatch.setattr(coordinator.file, "append", full)
    monkeypatch.setattr(coordinator.server, "handle_error", lambda *arguments: None)
    stage.sender.deliver()
    assert len(stage.sender.unsent) == 1
    coordinator.restart()
    stage.sender.deliver()
    assert coordinator.numbers() == [0]
