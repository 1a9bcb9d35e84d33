"""Metrics that are not counted but read when somebody scrapes: the plan, this machine, its container, its card."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from noodle import __version__
from noodle.metrics.machine import ContainerUse, MachineUse, container_use, machine_use


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Who computes what: one stage of a plan as /metrics shows it."""

    stage_id: int
    machine: str
    start_layer: int
    end_layer: int
    dtype: str
    predicted_seconds: float  # of one decode token
    device: str = ""  # what the stage calls the device it computes on, empty while it is silent


@dataclass(frozen=True, slots=True)
class PlanSeen:
    """The plan that a service goes by."""

    version: int
    stages: Sequence[PlannedStage]
    predicted_token_seconds: float | None = None  # the planner's alone: it knows what a hop is taken to cost
    is_up: bool | None = None  # the coordinator's alone: whether every stage is reachable


class PlanCollector(Collector):
    """The plan, asked for when somebody scrapes."""

    def __init__(self, registry: CollectorRegistry, seen: Callable[[], PlanSeen]) -> None:
        self._seen = seen
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Two labels name a stage, the others say what the plan gives it: they change with plans alone."""
        seen = self._seen()
        yield _gauge("noodle_plan_version", "Version of the plan this service goes by, 0 for none.", seen.version)
        if seen.predicted_token_seconds is not None:
            text = "What the planner predicts for one token of a single request, hops included."
            yield _gauge("noodle_plan_predicted_token_seconds", text, seen.predicted_token_seconds)
        if seen.is_up is not None:
            yield _gauge("noodle_pipeline_up", "1 when requests can be computed.", float(seen.is_up))
        if not seen.stages:
            return
        layers = GaugeMetricFamily(
            "noodle_plan_stage_layers",
            "Layers of a stage, from start_layer to before end_layer.",
            labels=["stage", "machine", "start_layer", "end_layer", "dtype", "device"],
        )
        predicted = GaugeMetricFamily(
            "noodle_plan_stage_predicted_seconds",
            "What the planner predicts that a stage computes for one token.",
            labels=["stage", "machine"],
        )
        for stage in seen.stages:
            name, start, end = str(stage.stage_id), stage.start_layer, stage.end_layer
            layers.add_metric([name, stage.machine, str(start), str(end), stage.dtype, stage.device], end - start)
            predicted.add_metric([name, stage.machine], stage.predicted_seconds)
        yield layers
        yield predicted


@dataclass(frozen=True, slots=True)
class CardUse:
    """A card, as far as its driver tells."""

    name: str
    memory_bytes: int
    free_bytes: int
    busy_share: float | None = None
    celsius: float | None = None


class MachineCollector(Collector):
    """This machine, its container and its card, read when somebody scrapes; what can not be read is left out."""

    def __init__(
        self,
        registry: CollectorRegistry,
        machine: str,
        *,
        read_machine: Callable[[], MachineUse | None] = machine_use,
        read_container: Callable[[], ContainerUse] = container_use,
    ) -> None:
        self._machine, self._read_machine, self._read_container = machine, read_machine, read_container
        self.read_card: Callable[[], CardUse | None] = lambda: None  # set by a stage that computes on one
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Several services of one machine say the same of it: take the largest, not the sum."""
        machine, labels = self._read_machine(), {"machine": self._machine}
        if machine is not None:
            busy = CounterMetricFamily(
                "noodle_machine_cpu_busy_seconds", "Seconds that cores were busy, all cores together.", labels=[*labels]
            )
            busy.add_metric([*labels.values()], machine.busy_seconds)
            yield busy
            yield _gauge("noodle_machine_cpu_cores", "Cores of the machine.", machine.core_count, labels)
            yield _gauge("noodle_machine_memory_bytes", "Memory of the machine.", machine.memory_bytes, labels)
            text = "Memory that programs may still take."
            yield _gauge("noodle_machine_memory_available_bytes", text, machine.available_bytes, labels)
        container = self._read_container()
        for name, text, value in (
            ("memory_limit_bytes", "Memory that this service's container may take.", container.memory_limit_bytes),
            ("memory_bytes", "Memory that it has taken, without what can be taken back.", container.memory_bytes),
            ("cpu_limit_cores", "Cores whose time it may take.", container.core_limit),
        ):
            if value is not None:
                yield _gauge(f"noodle_container_{name}", text, value)
        card = self.read_card()
        if card is not None:
            labels = {**labels, "gpu": card.name}
            yield _gauge("noodle_gpu_memory_bytes", "Memory of the card.", card.memory_bytes, labels)
            yield _gauge("noodle_gpu_memory_free_bytes", "Memory that nobody has taken.", card.free_bytes, labels)
            for name, text, number in (
                ("utilization_ratio", "Share of the time in which the card computed.", card.busy_share),
                ("temperature_celsius", "Its temperature.", card.celsius),
            ):
                if number is not None:
                    yield _gauge(f"noodle_gpu_{name}", text, number, labels)


def service_registry(service: str, machine: str) -> tuple[CollectorRegistry, MachineCollector]:
    """What every service shows: its version, its process (`process_*`, as everywhere) and its machine."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("noodle_build_info", "Always 1.", ["version", "service", "python"], registry=registry)
    build.labels(__version__, service, platform.python_version()).set(1)
    return registry, MachineCollector(registry, machine)


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[*(labels or {})])
    family.add_metric([*(labels or {}).values()], value)
    return family
