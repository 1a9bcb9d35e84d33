"""A stage's metrics reach a real coordinator exactly once, over a bad cable and across restarts of both ends."""

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from noodle.config.environment import stage_config
from services.stage.metrics_sender import MetricsSender
from tests.support.network.relay import Relay
from tests.support.processes.cluster import free_ports, request, wait_until
from tests.support.processes.stage_rig import started

TOKEN = "a-token-of-some-length"
READY_SECONDS = 60.0
STOP_SECONDS = 60.0
DELIVERED_SECONDS = 60.0


class Coordinator:
    """A coordinator process without Valkey and stages; /log_metrics needs neither."""

    def __init__(self, folder, model):
        (self.port,) = free_ports(1)
        self.log_path = folder / "coordinator.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")}
        self.environment = kept | {
            "NOODLE_CLUSTER_TOKEN": TOKEN,
            "NOODLE_COORDINATOR_BIND": f"127.0.0.1:{self.port}",
            "NOODLE_VALKEY_URL": "redis://127.0.0.1:1",
            "NOODLE_MODEL": str(model),
            "NOODLE_CACHE_DIR": str(folder / "cache"),
            "NOODLE_STATE_DIR": str(folder / "a"),
            "NOODLE_REPORTS_DIR": str(folder / "reports"),
        }
        self.start()

    def start(self):
        self.process = started("services.coordinator", self.environment, self.log_path)
        wait_until(self.answers, READY_SECONDS, "the coordinator answers")

    def answers(self):
        try:
            return request(self.port, "GET", "/health")[0] == 200
        except OSError:
            return False

    def numbers(self):
        status, answer = request(self.port, "GET", "/log_metrics?last=1000", token=TOKEN)
        assert status == 200
        return [entry["metrics"]["number"] for entry in answer["entries"]]

    def end(self, *, in_order):
        """End it by SIGTERM, or by SIGKILL to gunicorn's master and to its worker, which holds the port."""
        if in_order:
            self.process.terminate()
        else:
            master = self.process.pid
            children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii")
            for pid in [master, *map(int, children.split())]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)


@pytest.fixture
def coordinator(tmp_path, tiny_folder):
    running = Coordinator(tmp_path, tiny_folder)
    yield running
    running.end(in_order=True)


class Stage:
    """A sender whose snapshots are numbers; `restart` makes the next process over the same folder."""

    def __init__(self, url, folder):
        self.options = {
            "NOODLE_CLUSTER_TOKEN": TOKEN,
            "NOODLE_COORDINATOR_URL": url,
            "NOODLE_STATE_DIR": str(folder / "b"),
        }
        self.number = 0
        self.restart()

    def restart(self):
        self.sender = MetricsSender(stage_config(self.options), "boot", CollectorRegistry())

    def measure(self, count):
        for _ in range(count):
            self.number += 1
            entry = {"entry_id": f"{self.number:032x}", "node_id": "machine-b", "metrics": {"number": self.number}}
            self.sender.unsent.add(entry)

    def is_delivered(self):
        self.sender.deliver()
        return len(self.sender.unsent) == 0


def test_lost_answers_and_the_death_of_either_end_lose_nothing_and_double_nothing(coordinator, tmp_path):
    with Relay(coordinator.port) as relay:
        stage = Stage(relay.url, tmp_path)
        stage.measure(3)
        relay.cut_after_bytes = 0  # requests arrive, answers are lost
        assert not stage.is_delivered()
        wait_until(lambda: coordinator.numbers() == [1, 2, 3], DELIVERED_SECONDS, "the coordinator has them")
        coordinator.end(in_order=False)
        stage.restart()
        stage.measure(2)
        assert not stage.is_delivered()  # nothing listens
        coordinator.start()
        assert not stage.is_delivered()  # answers are lost again
        relay.cut_after_bytes = None
        assert stage.is_delivered()
        assert coordinator.numbers() == [1, 2, 3, 4, 5]
        assert not list((tmp_path / "b").iterdir())


def test_a_cable_that_is_cut_again_and_again_lets_everything_through_once(coordinator, tmp_path):
    rng = random.Random(7)
    with Relay(coordinator.port) as relay:
        stage = Stage(relay.url, tmp_path)
        for _ in range(30):
            stage.measure(3)
            relay.cut_after_bytes = rng.choice([0, 5, 80, None])  # 80 bytes hold the status, which is enough
            stage.sender.deliver()
        relay.cut_after_bytes = None
        assert stage.is_delivered()
        assert coordinator.numbers() == list(range(1, 91))
