"""What /metrics shows: names and units, this machine and its container, the plan, and where a token's time went."""

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from noodle import __version__
from noodle.cluster.plan import StageAssignment
from noodle.metrics.counted import CoordinatorMetrics, PlannerMetrics, StageMetrics, StepMetrics
from noodle.metrics.machine import ContainerUse, MachineUse, container_use, machine_use
from noodle.metrics.scraped import CardUse, MachineCollector, PlanCollector, PlanSeen, service_registry
from noodle.wire.messages import StageTiming

BOUNDED_LABELS = {
    "device", "dtype", "end_layer", "gpu", "key", "kind", "le", "machine", "outcome", "part", "python", "reason",
    "service", "stage", "start_layer", "transport", "version",
}  # fmt: skip
# Units of Prometheus' naming rules, what is counted, and vLLM's own names.
ENDINGS = re.compile(
    r"_(seconds|bytes|ratio|celsius|cores|info|tokens|steps|results|requests|replays|spans|frames|entries|sessions|"
    r"snapshots|machines|stages|layers|preemptions|queries|hits|version|up|running|waiting|perc)$"
)
STAGES = [(0, "machine-a"), (1, "machine-b")]


def all_registries():
    for name, metrics in (("coordinator", CoordinatorMetrics), ("planner", PlannerMetrics), ("stage", StageMetrics)):
        registry, machine = service_registry(name, "machine-a")
        machine.read_card = lambda: CardUse("card", 2, 1, 0.5, 50.0)
        metrics(registry)
        stage = StageAssignment(0, "machine-a", "http://a:8081", 0, 3, "float32")
        PlanCollector(registry, lambda stage=stage: PlanSeen(1, [stage], predicted_token_seconds=0.1, is_up=True))
        yield registry


def test_every_name_has_the_prefix_a_unit_and_a_remark_and_every_label_is_bounded():
    for registry in all_registries():
        for family in registry.collect():
            if family.name.startswith("process_"):
                continue
            assert family.name.startswith("noodle_"), family.name
            assert ENDINGS.search(family.name), family.name
            assert family.documentation.endswith("."), family.name
            assert {label for sample in family.samples for label in sample.labels} <= BOUNDED_LABELS, family.name


def test_a_service_says_its_version_its_process_and_its_machine():
    registry, _ = service_registry("planner", "machine-a")
    assert 'noodle_build_info{python="3.' in (text := generate_latest(registry).decode())
    assert f'service="planner",version="{__version__}"' in text
    assert registry.get_sample_value("process_resident_memory_bytes") > 1 << 20
    here = {"machine": "machine-a"}
    assert registry.get_sample_value("noodle_machine_cpu_busy_seconds_total", here) > 0
    total, available = (
        registry.get_sample_value(f"noodle_machine_memory_{name}bytes", here) for name in ("", "available_")
    )
    assert 0 < available <= total


def test_processor_time_and_memory_are_read_as_linux_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path))
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    (tmp_path / "stat").write_text(
        "cpu  1000 200 300 50000 400 50 60 70 900 0\ncpu0 1 0 0 0\ncpu1 1 0 0 0\nintr 1 2\nctxt 5\n"
    )
    fields = {"MemTotal": 16000, "MemAvailable": 8000}
    names = ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "Active", "Inactive")
    (tmp_path / "meminfo").write_text("".join(f"{name}: {fields.get(name, 0)} kB\n" for name in names))
    use = machine_use()
    assert use is not None
    assert (use.core_count, use.memory_bytes, use.available_bytes) == (2, 16000 * 1024, 8000 * 1024)
    assert use.busy_seconds == pytest.approx(16.8)  # 1680 hundredths: idle and waiting for a disk are not busy


@pytest.mark.parametrize("stat", ["", "cpu  1 2\n", "cpu  a b c d e f g h\n"])
def test_a_system_without_these_files_shows_no_number_rather_than_a_wrong_one(tmp_path, monkeypatch, stat):
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path))
    assert machine_use() is None
    (tmp_path / "stat").write_text(stat)
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    assert machine_use() is None
    registry = CollectorRegistry()
    MachineCollector(registry, "machine-a", read_machine=lambda: None, read_container=ContainerUse)
    assert list(registry.collect()) == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limits_are_read_in_both_versions_of_cgroups(tmp_path, version):
    memory, cpu = (tmp_path / "memory", tmp_path / "cpu") if version == 1 else (tmp_path, tmp_path)
    memory.mkdir(exist_ok=True)
    cpu.mkdir(exist_ok=True)
    files = (
        {memory / "memory.limit_in_bytes": "5000", memory / "memory.usage_in_bytes": "3000",
         cpu / "cpu.cfs_quota_us": "150000", cpu / "cpu.cfs_period_us": "100000"}
        if version == 1
        else {memory / "memory.max": "5000", memory / "memory.current": "3000", cpu / "cpu.max": "150000 100000"}
    )  # fmt: skip
    for path, text in files.items():
        path.write_text(text + "\n")
    (memory / "memory.stat").write_text("anon 1\ninactive_file 500\ntotal_inactive_file 500\n")
    assert container_use(tmp_path) == ContainerUse(version, 5000, 2500, 1.5)


def test_a_container_without_limits_shows_none(tmp_path):
    assert container_use(tmp_path) == ContainerUse()
    for name, text in (("memory.max", "max"), ("memory.current", "3000"), ("cpu.max", "max 100000")):
        (tmp_path / name).write_text(text + "\n")
    assert container_use(tmp_path) == ContainerUse()


def test_a_card_is_shown_as_far_as_its_driver_tells():
    registry = CollectorRegistry()
    machine = MachineUse(2, 1.0, 2, 1)
    collector = MachineCollector(registry, "b", read_machine=lambda: machine, read_container=ContainerUse)
    collector.read_card = lambda: CardUse("GTX 1050", 4000, 1000)
    card = {"machine": "b", "gpu": "GTX 1050"}
    assert registry.get_sample_value("noodle_gpu_memory_free_bytes", card) == 1000
    assert registry.get_sample_value("noodle_gpu_utilization_ratio", card) is None
    collector.read_card = lambda: CardUse("GTX 1050", 4000, 1000, 0.25, 61.0)
    assert registry.get_sample_value("noodle_gpu_utilization_ratio", card) == 0.25
    assert registry.get_sample_value("noodle_gpu_temperature_celsius", card) == 61.0


def test_the_plan_says_who_computes_what():
    seen = [PlanSeen(0)]
    registry = CollectorRegistry()
    PlanCollector(registry, lambda: seen[0])
    assert registry.get_sample_value("noodle_plan_version") == 0
    seen[0] = PlanSeen(
        7, [StageAssignment(1, "machine-b", "http://b:8081", 3, 8, "float32")], {1: "some CPU"}, is_up=True
    )
    labels = {
        "stage": "1", "machine": "machine-b", "start_layer": "3", "end_layer": "8", "dtype": "float32",
        "device": "some CPU",
    }  # fmt: skip
    assert registry.get_sample_value("noodle_plan_stage_layers", labels) == 5
    assert registry.get_sample_value("noodle_plan_version") == 7
    assert registry.get_sample_value("noodle_pipeline_up") == 1
    assert registry.get_sample_value("noodle_plan_predicted_token_seconds") is None


@pytest.fixture
def steps():
    registry = CollectorRegistry()
    metrics = StepMetrics(registry)
    metrics.begin_plan(STAGES)

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    return metrics, value


TIMINGS = [StageTiming(0, 0.001, 0.010, 0.002), StageTiming(1, 0.003, 0.020, 0.0)]


def test_a_tokens_time_is_told_in_parts_that_add_up(steps):
    metrics, value = steps
    metrics.count_step(TIMINGS, 0.040, is_decode=True, tokens=3, since_last_seconds=0.150)
    parts = {
        (part, stage): value("noodle_token_stage_seconds_total", part=part, stage=str(stage), machine=machine)
        for part in ("compute", "wait", "send")
        for stage, machine in STAGES
    }
    assert parts["compute", 1] == pytest.approx(0.060)
    assert parts["send", 0] == pytest.approx(0.006)
    hop = value("noodle_token_hop_seconds_total")
    assert hop == pytest.approx(0.150 - 3 * 0.036)
    assert sum(parts.values()) + hop == pytest.approx(0.150)
    assert value("noodle_step_seconds_sum", kind="decode") == pytest.approx(0.040)


def test_of_sending_that_overlaps_with_what_comes_after_it_only_the_rest_is_counted(steps):
    metrics, value = steps
    timings = [StageTiming(0, 0.001, 0.010, 0.030), StageTiming(1, 0.003, 0.020, 0.010)]
    metrics.count_step(timings, 0.040, is_decode=True, tokens=2, since_last_seconds=0.088)
    sent = [
        value("noodle_token_stage_seconds_total", part="send", stage=str(stage), machine=machine)
        for stage, machine in STAGES
    ]
    assert sent == pytest.approx([0.015, 0.005])  # 0.088 less twice 0.034 are left for both, three to one
    assert value("noodle_token_hop_seconds_total") == pytest.approx(0.0, abs=1e-12)
    assert value("noodle_stage_send_seconds_sum", stage="0", machine="machine-a") == pytest.approx(0.030)


def test_a_step_without_a_second_token_counts_as_a_step_alone(steps):
    metrics, value = steps
    metrics.count_step(TIMINGS, 0.5, is_decode=False, tokens=0, since_last_seconds=0.0)
    assert value("noodle_stage_compute_seconds_sum", stage="1", machine="machine-b") == pytest.approx(0.020)
    assert value("noodle_token_stage_seconds_total", part="compute", stage="1", machine="machine-b") == 0
    assert value("noodle_step_seconds_count", kind="prefill") == 1
    assert value("noodle_token_hop_seconds_total") == 0


def test_a_stage_that_is_in_no_plan_is_not_counted_and_a_rest_is_never_negative(steps):
    metrics, value = steps
    metrics.count_step([*TIMINGS, StageTiming(9, 1.0, 1.0)], 0.04, is_decode=True, tokens=1, since_last_seconds=0.001)
    assert value("noodle_token_hop_seconds_total") == 0
    metrics.begin_plan([(0, "machine-c")])
    metrics.count_step(TIMINGS, 0.04, is_decode=True, tokens=1, since_last_seconds=1.0)
    assert value("noodle_stage_compute_seconds_count", stage="0", machine="machine-c") == 1
    assert value("noodle_stage_compute_seconds_count", stage="1", machine="machine-b") == 1
