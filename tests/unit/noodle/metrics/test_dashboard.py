"""Dashboards and their provisioning by rules: what grafana/dashboard-linter asks for, and that each metric exists."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import StageAssignment
from noodle.metrics.counted import CoordinatorMetrics, PlannerMetrics, StageMetrics
from noodle.metrics.machine import ContainerUse
from noodle.metrics.scraped import CardUse, MachineCollector, PlanCollector, PlanSeen, service_registry
from tests.support.processes.prometheus import GRAFANA, RATE_INTERVAL, without_data_here

DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
DATASOURCE_UID = "noodle-prometheus"
GRID_COLUMNS = 24
NAME = re.compile(r"\b(?:noodle|process)_[a-z0-9_]+")
PANELS = [
    pytest.param(panel, id=f"{path.stem}: {panel['title']}")
    for path in DASHBOARDS
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
    if panel["type"] != "row"
]


def yaml_of(path):
    return yaml.safe_load((GRAFANA / path).read_text(encoding="utf-8"))


def exported_names():
    """Every name that some service may show."""
    names = set()
    for metrics in (CoordinatorMetrics, PlannerMetrics, StageMetrics):
        registry, _ = service_registry("service", "machine")
        metrics(registry)
        stage = StageAssignment(0, "machine", "http://machine:8081", 0, 3, "float32")
        PlanCollector(registry, lambda stage=stage: PlanSeen(1, [stage], predicted_token_seconds=0.1, is_up=True))
        names |= names_of(registry)
    registry = CollectorRegistry()
    collector = MachineCollector(registry, "machine", read_container=lambda: ContainerUse(2, 2, 1, 1.0))
    collector.read_card = lambda: CardUse("card", 2, 1, 0.5, 50.0)
    return names | names_of(registry)


def names_of(registry):
    """Samples, and those that appear when something is counted for the first time."""
    names = set()
    for family in registry.collect():
        names |= {sample.name for sample in family.samples} | {family.name}
        if family.type == "counter":
            names.add(family.name + "_total")
        elif family.type == "histogram":
            names |= {family.name + ending for ending in ("_bucket", "_sum", "_count")}
    return names


def test_there_is_a_dashboard():
    assert PANELS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_a_name_of_its_own_and_panels_beside_one_another(path):
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["title"]
    assert dashboard["uid"] == path.stem
    assert "noodle" in dashboard["tags"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_COLUMNS, panel["title"]
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):  # fmt: skip  # noqa: E501
            assert cell not in taken, f"{panel['title']} lies on {taken.get(cell)}"
            taken[cell] = panel["title"]


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows_and_what_to_do(panel):
    assert panel["title"]
    assert len(panel["description"]) > 40
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]


@pytest.mark.parametrize("panel", PANELS)
def test_a_query_asks_the_provisioned_datasource_and_fixes_no_interval(panel):
    assert panel["datasource"] == {"type": "prometheus", "uid": DATASOURCE_UID}
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    several = len(panel["targets"]) > 1
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == DATASOURCE_UID
        assert target["legendFormat"] or not several
        expression = target["expr"]
        assert re.findall(r"\[([^\]]*)\]", expression) == [RATE_INTERVAL] * expression.count("[")
        assert ("rate(" in expression) == (RATE_INTERVAL in expression)
        for counter in re.findall(r"\b[a-z_]+_total\b", expression):
            assert re.search(rf"rate\({counter}[{{\[]", expression), f"{counter} only grows: ask for its rate"


@pytest.mark.parametrize("panel", PANELS)
def test_a_query_asks_for_metrics_that_there_are(panel):
    known = exported_names()
    for target in panel["targets"]:
        assert set(NAME.findall(target["expr"])) <= known


def test_a_panel_that_has_no_data_on_every_machine_says_so():
    for parameter in PANELS:
        panel = parameter.values[0]
        missing = [target["expr"] for target in panel["targets"] if without_data_here(target["expr"])]
        assert bool(missing) == ("No data " in panel["description"]), panel["title"]


def test_the_datasource_is_the_one_that_panels_name_and_as_fast_as_prometheus():
    (datasource,) = yaml_of("provisioning/datasources/noodle.yml")["datasources"]
    assert datasource["uid"] == DATASOURCE_UID
    assert datasource["jsonData"]["timeInterval"] == yaml_of("prometheus.yml")["global"]["scrape_interval"]


def test_grafana_is_told_where_the_dashboards_are():
    (provider,) = yaml_of("provisioning/dashboards/noodle.yml")["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).name == "dashboards"


def test_prometheus_takes_the_token_from_its_file_for_targets_and_for_metrics():
    (job,) = yaml_of("prometheus.yml")["scrape_configs"]
    assert job["job_name"] == "noodle"  # panels ask for it
    assert job["honor_labels"]
    (discovery,) = job["http_sd_configs"]
    for part in (job, discovery):
        assert part["authorization"]["credentials_file"] == "/run/secrets/cluster_token"
    assert discovery["url"] == "http://coordinator:8080/prometheus/targets"
