"""Metrics that are read at each scrape: the plan, this machine, its container and its card."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from noodle import __version__
from noodle.cluster.plan import StageAssignment
from noodle.metrics.machine import ContainerUse, MachineUse, container_use, machine_use


@dataclass(frozen=True, slots=True)
class PlanSeen:
    """The plan that a service follows."""

    version: int
    stages: Sequence[StageAssignment] = ()  # with their samples
    device_names: Mapping[int, str] = field(default_factory=dict)  # by stage id; a silent stage has none
    predicted_token_seconds: float | None = None  # of the planner, which knows the cost of hops
    is_up: bool | None = None  # of the coordinator: every stage is reachable


class PlanCollector(Collector):
    """The plan, read at each scrape."""

    def __init__(self, registry: CollectorRegistry, seen: Callable[[], PlanSeen]) -> None:
        self._seen = seen
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Yield the plan; its labels change only with the plan."""
        seen = self._seen()
        yield _gauge("noodle_plan_version", "Version of the plan that this service follows, 0 for none.", seen.version)
        if seen.predicted_token_seconds is not None:
            text = "Predicted seconds of one token of a single request, hops included."
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
            "Predicted seconds of one token on a stage.",
            labels=["stage", "machine"],
        )
        for stage in seen.stages:
            name, start, end = str(stage.stage_id), stage.start_layer, stage.end_layer
            device = seen.device_names.get(stage.stage_id, "")
            layers.add_metric([name, stage.machine, str(start), str(end), stage.dtype, device], end - start)
            predicted.add_metric([name, stage.machine], stage.decode_seconds)
        yield layers
        yield predicted


@dataclass(frozen=True, slots=True)
class CardUse:
    """A card, as its driver reports it."""

    name: str
    memory_bytes: int
    free_bytes: int
    busy_share: float | None = None
    celsius: float | None = None


class MachineCollector(Collector):
    """This machine, its container and its card, read at each scrape; values that cannot be read are left out."""

    def __init__(
        self,
        registry: CollectorRegistry,
        machine: str,
        *,
        read_machine: Callable[[], MachineUse | None] = machine_use,
        read_container: Callable[[], ContainerUse] = container_use,
    ) -> None:
        self._machine, self._read_machine, self._read_container = machine, read_machine, read_container
        self.read_card: Callable[[], CardUse | None] = lambda: None  # a stage on a card replaces it
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; services of one machine report the same values, so take the largest, not the sum."""
        machine, labels = self._read_machine(), {"machine": self._machine}
        if machine is not None:
            busy = CounterMetricFamily(
                "noodle_machine_cpu_busy_seconds", "Seconds in which cores were busy, of all cores.", labels=[*labels]
            )
            busy.add_metric([*labels.values()], machine.busy_seconds)
            yield busy
            yield _gauge("noodle_machine_cpu_cores", "Cores of the machine.", machine.core_count, labels)
            yield _gauge("noodle_machine_memory_bytes", "Memory of the machine.", machine.memory_bytes, labels)
            text = "Memory available to programs."
            yield _gauge("noodle_machine_memory_available_bytes", text, machine.available_bytes, labels)
        container = self._read_container()
        for name, text, value in (
            ("memory_limit_bytes", "Memory limit of this service's container.", container.memory_limit_bytes),
            ("memory_bytes", "Memory in use, without reclaimable pages.", container.memory_bytes),
            ("cpu_limit_cores", "Cores whose time it may use.", container.core_limit),
        ):
            if value is not None:
                yield _gauge(f"noodle_container_{name}", text, value)
        card = self.read_card()
        if card is not None:
            labels = {**labels, "gpu": card.name}
            yield _gauge("noodle_gpu_memory_bytes", "Memory of the card.", card.memory_bytes, labels)
            yield _gauge("noodle_gpu_memory_free_bytes", "Free memory of the card.", card.free_bytes, labels)
            for name, text, number in (
                ("utilization_ratio", "Share of time in which the card computed.", card.busy_share),
                ("temperature_celsius", "Temperature of the card.", card.celsius),
            ):
                if number is not None:
                    yield _gauge(f"noodle_gpu_{name}", text, number, labels)


def service_registry(service: str, machine: str) -> tuple[CollectorRegistry, MachineCollector]:
    """Return a registry with the version, process (`process_*`) and machine of a service."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("noodle_build_info", "Always 1.", ["version", "service", "python"], registry=registry)
    build.labels(__version__, service, platform.python_version()).set(1)
    return registry, MachineCollector(registry, machine)


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[*(labels or {})])
    family.add_metric([*(labels or {}).values()], value)
    return family
