"""Memory and disk for `noodle doctor`, against what the plan and the images need; figures in, findings out."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from services.cli.doctor.docker import DockerFacts
from services.cli.doctor.outcome import Outcome, error, ok, skipped, warning
from services.cli.project.programs import Run, System

IMAGE_SECONDS = 5.0
GIGABYTE = 1_000_000_000
IMAGE_BYTES = 8 * GIGABYTE  # images and their build cache, with torch's CUDA libraries
SPARE_BYTES = 1 * GIGABYTE  # of disk, whatever is built: logs, Valkey's file, measurements
PROCESS_BYTES = 1 * GIGABYTE  # of memory beside the layers: torch, the other services, the system
CAP_SHARE = 0.7  # of the machine's memory; a Docker that gets less than this is capped by hand or by WSL's default
WSL_CURE = (
    'notepad "$Env:UserProfile\\.wslconfig"   (write [wsl2] and under it memory={gigabytes}GB)\n'
    "wsl --shutdown   (then start Docker Desktop again)"
)


class MemoryFacts(Struct, frozen=True):
    """Bytes of this machine; None: not known."""

    total_bytes: int | None
    available_bytes: int | None
    disk_path: str
    disk_free_bytes: int | None
    has_images: bool | None = None  # noodle's are built


class Need(Struct, frozen=True):
    """What the plan puts on this machine."""

    cpu_bytes: int  # weights and KV rows in its main memory
    weight_bytes: int  # of all its stages: what is kept on disk
    is_loaded: bool  # its stages hold their layers already


def gather_memory(run: Run, docker: DockerFacts | None, cache_dir: Path) -> MemoryFacts:
    """Read this machine's figures."""
    total_bytes, available_bytes = _windows_memory() if sys.platform == "win32" else _linux_memory()
    path = cache_dir
    if docker is not None and docker.root_dir and not docker.is_desktop:
        path = Path(docker.root_dir)
    has_images = None
    if docker is not None and docker.is_installed and not docker.problem:
        ran = run(["docker", "image", "ls", "--quiet", "--filter", "reference=*noodle*"], IMAGE_SECONDS)
        has_images = bool(ran.output.split()) if ran.is_good else None
    return MemoryFacts(total_bytes, available_bytes, str(path), _free_bytes(path), has_images)


def need_of(planned: Mapping[str, Any], machine: str, phases: Mapping[int, str]) -> Need | None:
    """What a plan (as POST /plan/generate answers it) puts on a machine; `phases` of the stages, by their id."""
    mine = [stage for stage in planned.get("stages", []) if stage.get("node_id") == machine]
    if not mine:
        return None
    return Need(
        sum(stage["weight_bytes"] + stage["kv_bytes"] for stage in mine if stage["device_type"] == "cpu"),
        sum(stage["weight_bytes"] for stage in mine),
        all(phases.get(stage["stage_id"]) == "ready" for stage in mine),
    )


def check_memory(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, why_no_need: str, where: str, system: System
) -> list[Outcome]:
    """Memory against the plan, what Docker may have of it, and disk."""
    return [
        _check_available(facts, docker, need, why_no_need, where),
        *_check_cap(facts, docker, need, where, system),
        _check_disk(facts, need, where, system),
    ]


def _check_available(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, why_no_need: str, where: str
) -> Outcome:
    free_bytes = facts.available_bytes
    if free_bytes is None:
        return skipped("memory", where, "this system does not tell its free memory")
    if docker is not None and docker.is_desktop and docker.memory_bytes:
        free_bytes = min(free_bytes, docker.memory_bytes)
    why = "a stage that finds too little memory is ended by the system, or swaps and crawls"
    cure = "close other programs, promise a shorter context (NOODLE_CONTEXT_LENGTH in .env), or see `noodle plan`"
    if need is None:
        if free_bytes < PROCESS_BYTES:
            what = f"{_gigabytes(free_bytes)} of memory are free, before any layer is loaded."
            return warning("memory", where, what, why=why, cure=cure)
        return skipped("memory", where, f"{_gigabytes(free_bytes)} are free; what the plan needs: {why_no_need}")
    if need.is_loaded:
        return ok("memory", where, f"its layers are loaded; {_gigabytes(free_bytes)} are free beside them")
    if free_bytes < need.cpu_bytes:
        what = f"The plan puts {_gigabytes(need.cpu_bytes)} here, {_gigabytes(free_bytes)} are free."
        return error("memory", where, what, why=why, cure=cure)
    return ok("memory", where, f"the plan needs {_gigabytes(need.cpu_bytes)}, {_gigabytes(free_bytes)} are free")


def _check_cap(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, where: str, system: System
) -> list[Outcome]:
    """WSL gives Docker half of the machine's memory unless it is told otherwise."""
    if docker is None or not docker.is_desktop or not facts.total_bytes or not docker.memory_bytes:
        return []
    shown = f"Docker may have {_gigabytes(docker.memory_bytes)} of {_gigabytes(facts.total_bytes)}"
    needed_bytes = (need.cpu_bytes if need is not None else 0) + PROCESS_BYTES
    if docker.memory_bytes >= min(needed_bytes, CAP_SHARE * facts.total_bytes) and need is not None:
        return [ok("memory cap", where, shown)]
    if docker.memory_bytes >= CAP_SHARE * facts.total_bytes:
        return [ok("memory cap", where, shown)]
    gigabytes = max(1, int(0.8 * facts.total_bytes / GIGABYTE))
    cure = WSL_CURE.format(gigabytes=gigabytes) if system == "windows" else "raise the memory in Docker's settings"
    why = "the stage sees only that, and the planner gives it fewer layers"
    return [(error if need else warning)("memory cap", where, f"{shown}.", why=why, cure=cure)]


def _check_disk(facts: MemoryFacts, need: Need | None, where: str, system: System) -> Outcome:
    if facts.disk_free_bytes is None:
        return skipped("disk", where, f"{facts.disk_path} does not tell how much is free on its disk")
    needed_bytes = SPARE_BYTES + (need.weight_bytes if need is not None else 0)
    needed_bytes += IMAGE_BYTES if facts.has_images is False else 0
    shown = f"{_gigabytes(facts.disk_free_bytes)} free on the disk of {facts.disk_path}"
    if facts.disk_free_bytes >= needed_bytes:
        return ok("disk", where, shown)
    what = f"{shown}; images and weights may take {_gigabytes(needed_bytes)}."
    why = "a build or a fetch of weights that finds no room ends in the middle"
    cure = "docker system prune   (removes what no container uses)" if system != "other" else "make room there"
    return (error if facts.disk_free_bytes < SPARE_BYTES else warning)("disk", where, what, why=why, cure=cure)


def _linux_memory() -> tuple[int | None, int | None]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, None
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    return fields.get("MemTotal"), fields.get("MemAvailable")


def _windows_memory() -> tuple[int | None, int | None]:
    names = ("total", "free", "pages", "free_pages", "space", "free_space", "more")

    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *[(name, ctypes.c_ulonglong) for name in names],
        ]

    status: Any = Status(length=ctypes.sizeof(Status))
    windows: Any = ctypes
    if not windows.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.free)


def _free_bytes(path: Path) -> int | None:
    """On the disk of a path, or of the nearest folder above it that is there."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def _gigabytes(byte_count: float) -> str:
    return f"{byte_count / GIGABYTE:.1f} GB"
