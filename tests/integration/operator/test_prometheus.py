"""A real Prometheus with the committed configuration: every panel of every dashboard has data."""

import json
import math
import subprocess

import pytest

from services.stage.metrics_sender import SNAPSHOT_SECONDS
from tests.support.processes.cluster import wait_until
from tests.support.processes.prometheus import (
    GRAFANA,
    RATE_INTERVAL,
    configuration,
    programs,
    running_prometheus,
    without_data_here,
)
from tests.support.processes.two_machines import two_machines

SHORTEST_RATE_INTERVAL = "20s"  # four scrapes of five seconds: the shortest that Grafana uses
DATA_SECONDS = 60.0
QUERIES = [
    pytest.param(target["expr"], id=f"{path.stem}: {panel['title']} {target['refId']}")
    for path in sorted((GRAFANA / "dashboards").glob("*.json"))
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
    for target in panel.get("targets", ())
]


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    programs()  # before services are started in vain
    with two_machines(tmp_path_factory.mktemp("machines") / "run", tiny_folder) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory):
    """A Prometheus that has scraped every service while requests were computed."""
    text = configuration(f"127.0.0.1:{cluster.port}", cluster.token_path)
    with running_prometheus(tmp_path_factory.mktemp("prometheus") / "run", text) as running:
        wait_until(lambda: len(running.targets()) == 4, DATA_SECONDS, "Prometheus knows every service")

        def rates_are_seen():
            cluster.generate([5, 6, 7], max_new_tokens=30, ignore_eos=True)
            asked = "min_over_time(rate(noodle_generation_tokens_total[20s])[6s:1s]) > 0"
            return running.query(asked) and running.query("rate(noodle_hop_round_trip_seconds_count[20s]) > 0")

        wait_until(rates_are_seen, DATA_SECONDS, "Prometheus has scraped twice while tokens were computed")
        yield running


def test_every_service_is_found_and_lets_prometheus_in(prometheus, cluster):
    found = {
        (target["labels"]["service"], target["labels"].get("stage", "")): target for target in prometheus.targets()
    }
    assert set(found) == {("coordinator", ""), ("planner", ""), ("stage", "0"), ("stage", "1")}
    assert {target["health"] for target in found.values()} == {"up"}
    assert found["stage", "1"]["labels"]["instance"] == f"127.0.0.1:{cluster.stage_ports[1]}"


@pytest.mark.parametrize("expression", QUERIES)
def test_a_panels_query_is_understood_and_has_data(prometheus, cluster, expression):
    asked = expression.replace(RATE_INTERVAL, SHORTEST_RATE_INTERVAL)

    def has_data():
        if any(math.isfinite(float(sample["value"][1])) for sample in prometheus.query(asked)):
            return True
        cluster.generate([5, 6, 7], max_new_tokens=30, ignore_eos=True)  # a busy machine may miss a scrape
        return False

    if without_data_here(expression):
        prometheus.query(asked)
    else:
        wait_until(has_data, DATA_SECONDS, f"{expression} has data")


def test_what_one_machine_measures_of_another_is_said_of_that_one(prometheus):
    def machines(query):
        return {sample["metric"]["machine"] for sample in prometheus.query(query)}

    assert machines("noodle_machine_memory_bytes") == {"machine-a", "machine-b"}
    for of_stage_1 in (
        'noodle_token_stage_seconds_total{stage="1"}',  # reported by the coordinator, which is on machine-a
        'noodle_plan_stage_layers{stage="1"}',
        'noodle_stage_kv_capacity_bytes{stage="1"}',
        'process_resident_memory_bytes{stage="1"}',
    ):
        assert machines(of_stage_1) == {"machine-b"}, of_stage_1
    assert machines('up{service="coordinator"}') == {"machine-a"}


def test_the_parts_of_a_tokens_time_add_up_to_the_time_between_tokens(prometheus):
    parts = prometheus.query("sum(noodle_token_stage_seconds_total) + sum(noodle_token_hop_seconds_total)")
    whole = prometheus.query("sum(noodle_inter_token_latency_seconds_sum)")
    assert float(parts[0]["value"][1]) == pytest.approx(float(whole[0]["value"][1]), rel=0.05)


def test_every_stage_has_told_the_coordinator_what_it_measured(prometheus, cluster):
    def told():
        entries = cluster.get("/log_metrics?last=100")[1]["entries"]
        return {entry["metrics"]["stage_id"]: entry for entry in entries}

    wait_until(lambda: set(told()) == {0, 1}, SNAPSHOT_SECONDS + DATA_SECONDS, "both stages have sent a snapshot")
    for entry in told().values():
        assert len(entry["entry_id"]) == 32
        assert entry["metrics"]["machine_memory_bytes"] > 0
    assert {sample["value"][1] for sample in prometheus.query("noodle_stage_unsent_snapshots")} == {"0"}


def test_the_configuration_is_one_that_promtool_finds_right(tmp_path):
    _, promtool = programs()
    token = tmp_path / "cluster_token"
    token.write_text("0123456789abcdef", encoding="utf-8")
    path = tmp_path / "prometheus.yml"
    path.write_text(configuration("127.0.0.1:8080", token), encoding="utf-8")
    done = subprocess.run([promtool, "check", "config", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
