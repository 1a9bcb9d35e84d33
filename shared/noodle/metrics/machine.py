"""Processor time and memory of this machine, and the limits of the container around this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MachineUse:
    """The whole machine, also when seen from a container; under Docker Desktop its virtual machine."""

    core_count: int
    busy_seconds: float  # of all cores, since the machine started
    memory_bytes: int
    available_bytes: int  # to programs


@dataclass(frozen=True, slots=True)
class ContainerUse:
    """Limits and use of this process's container; None where nothing limits it."""

    cgroup_version: int | None = None
    memory_limit_bytes: int | None = None
    memory_bytes: int | None = None  # without file pages that the system can reclaim
    core_limit: float | None = None


def machine_use() -> MachineUse | None:
    """Return the machine's use now, None on a system that does not report it."""
    try:
        times, memory = psutil.cpu_times(), psutil.virtual_memory()
        # guests are counted in user and nice already
        busy_seconds = sum(getattr(times, kind) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    except (OSError, AttributeError, LookupError, ValueError, TypeError):
        return None  # the metric is absent then, never wrong
    return MachineUse(psutil.cpu_count() or 1, busy_seconds, memory.total, memory.available)


def container_use(cgroup: Path = CGROUP) -> ContainerUse:
    """Return the container's use now, from cgroup version 2 or 1."""
    for version, folder, limit_name, used_name, inactive_name in (
        (2, cgroup, "memory.max", "memory.current", "inactive_file"),
        (1, cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit_bytes, used_bytes = _number_in(folder / limit_name), _number_in(folder / used_name)
        if limit_bytes is None or used_bytes is None or limit_bytes >= NO_LIMIT_BYTES:
            continue
        used_bytes -= _named_number_in(folder / "memory.stat", inactive_name)
        return ContainerUse(version, limit_bytes, max(0, used_bytes), _core_limit(cgroup))
    return ContainerUse(core_limit=_core_limit(cgroup))


def _number_in(path: Path) -> int | None:
    """The number in a file; None when it is missing or contains `max`."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="ascii").strip()
    return int(text) if text.isdigit() else None


def _named_number_in(path: Path, name: str) -> int:
    """The number after a name at the start of a line, 0 without one."""
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _core_limit(cgroup: Path) -> float | None:
    """Cores whose time the container may use, None without a limit."""
    if (cgroup / "cpu.max").is_file():
        quota, _, period = (cgroup / "cpu.max").read_text(encoding="ascii").strip().partition(" ")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    quota_us = _number_in(cgroup / "cpu" / "cpu.cfs_quota_us")  # -1 without a limit, which is no number here
    period_us = _number_in(cgroup / "cpu" / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us else None
