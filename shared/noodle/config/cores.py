"""How many cores this process may use: its affinity, and the CPU limit of its container."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROCESS_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def usable_cores(process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> int:
    """Cores that this process may use, at least 1.

    A limit of 2.5 cores counts as 2: with a third thread, all of them would be stopped in every period.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    limit = cpu_limit(process_groups, groups)
    cores = len(os.sched_getaffinity(0))
    return cores if limit is None else max(1, min(cores, int(limit)))


def cpu_limit(process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> float | None:
    """The least number of cores that a control group of this process is limited to (cgroup v1 and v2), None if none is.

    `process_groups` is the kernel's file of the groups that the process is in, `groups` the folder where they are
    mounted. A container often sees its own group as the root of the mount.
    """
    try:
        lines = process_groups.read_text().splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            folders, limit_of = _folders(groups, path), _limit_of_v2
        elif "cpu" in controllers.split(","):
            mounts = [groups / name for name in ("cpu", controllers) if (groups / name).is_dir()]
            folders, limit_of = (_folders(mounts[0], path), _limit_of_v1) if mounts else (iter(()), _limit_of_v1)
        else:
            continue
        limits += [limit for folder in folders if (limit := limit_of(folder)) is not None]
    return min(limits, default=None)


def _folders(root: Path, path: str) -> Iterator[Path]:
    """A group's folder and those of the groups around it, up to the root; missing ones are included."""
    inner = PurePosixPath(path.lstrip("/"))
    if ".." not in inner.parts:  # a group outside of what this container sees
        yield from (root / each for each in (inner, *inner.parents) if str(each) != ".")
    yield root


def _limit_of_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _cores(quota, period)


def _limit_of_v1(folder: Path) -> float | None:
    return _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cores(quota: str, period: str) -> float | None:
    """None without a quota: "max" in v2, -1 in v1."""
    if not quota.isdigit() or not period.isdigit() or not int(quota) or not int(period):
        return None
    return int(quota) / int(period)
