"""The plan, and whether this machine's memory and disk suffice for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from noodle.errors import NoodleError
from services.cli.client.health import ask_health
from services.cli.client.http_client import error_in, post_for_answer
from services.cli.doctor.context import MachineContext
from services.cli.doctor.docker import DockerFacts
from services.cli.doctor.results import CheckResult, error, ok, skipped, warning
from services.cli.project.programs import Run, System

PLAN_SECONDS = 8.0  # the planner's answer
IMAGE_SECONDS = 5.0  # one question to Docker
GIGABYTE = 1_000_000_000
IMAGE_BYTES = 8 * GIGABYTE  # of disk for images and their build cache, with torch's CUDA libraries
SPARE_BYTES = 1 * GIGABYTE  # of disk for logs, Valkey's file and measurements
PROCESS_BYTES = 1 * GIGABYTE  # of memory beside the layers, for torch, the other services and the system
CAP_SHARE = 0.7  # of the machine's memory; Docker has less only if it is capped by hand or by WSL's default
WSL_CURE = (
    'notepad "$Env:UserProfile\\.wslconfig"   (write [wsl2] and under it memory={gigabytes}GB)\n'
    "wsl --shutdown   (then start Docker Desktop again)"
)


class Planned(Struct, frozen=True):
    """The plan as the planner answers it, or why there is none."""

    answer: dict[str, Any] | None = None
    refusal: str = ""  # why it does not fit
    cures: tuple[str, ...] = ()
    reason: str = ""  # why it could not be asked
    phases: dict[int, str] = {}
    model: str = ""  # its name for clients


def ask_plan(context: MachineContext) -> Planned:
    """Return the plan for the registered machines; raises nothing."""
    if not context.coordinator_url:
        return Planned(reason="this machine has no coordinator yet")
    if not context.token:
        return Planned(reason="the cluster token is unknown here")
    url = context.coordinator_url
    health = ask_health(url, context.token)
    if not health.answer:
        return Planned(reason=health.detail)
    phases = {
        stage["stage_id"]: str(stage.get("phase", ""))
        for stage in health.stages
        if isinstance(stage.get("stage_id"), int)
    }
    try:
        status, answer = post_for_answer(f"{url}/plan/generate", {}, context.token, PLAN_SECONDS)
    except NoodleError as problem:
        if health.status == "failed":  # /health has the reason; with very many layers the planner answers too late
            return Planned(refusal=health.detail, phases=phases)
        return Planned(reason=problem.message)
    if status != 200:
        refused = error_in(answer)
        cures = tuple(str(cure["text"]) for cure in (answer.get("short") or {}).get("cures", ()))
        return Planned(refusal=refused.message if refused else f"answered {status}", cures=cures, phases=phases)
    return Planned(answer, phases=phases, model=str(health.answer.get("model") or answer["plan"]["model"]))


def check_plan(planned: Planned, where: str) -> CheckResult:
    if planned.answer is not None:
        plan = planned.answer["plan"]
        layers = ", ".join(
            f"{stage['start_layer']} to {stage['end_layer'] - 1} on {stage['node_id']}" for stage in plan["stages"]
        )
        return ok("plan", where, f"{planned.model} fits: layers {layers}")
    if planned.refusal:
        cures = "\n".join(["each of these alone would help:", *planned.cures, "noodle plan   (shows all figures)"])
        why = "no stage loads a layer until it fits"
        return error("plan", where, f"The model does not fit. {planned.refusal}", why=why, cure=cures)
    return skipped("plan", where, f"there is no plan: {planned.reason}")


class MemoryFacts(Struct, frozen=True):
    """Bytes of this machine; None is unknown."""

    total_bytes: int
    available_bytes: int
    disk_path: str
    disk_free_bytes: int | None
    has_images: bool | None = None  # whether noodle's are built


class Need(Struct, frozen=True):
    """What the plan puts on this machine."""

    cpu_bytes: int  # weights and KV rows in its main memory
    weight_bytes: int  # of all its stages, as kept on disk
    is_loaded: bool  # its stages have loaded their layers


def gather_memory(run: Run, docker: DockerFacts | None, cache_dir: Path) -> MemoryFacts:
    memory = psutil.virtual_memory()
    path = cache_dir
    if docker is not None and docker.root_dir and not docker.is_desktop:
        path = Path(docker.root_dir)
    has_images = None
    if docker is not None and docker.is_installed and not docker.problem:
        ran = run(["docker", "image", "ls", "--quiet", "--filter", "reference=*noodle*"], IMAGE_SECONDS)
        has_images = bool(ran.output.split()) if ran.is_good else None
    return MemoryFacts(memory.total, memory.available, str(path), _free_bytes(path), has_images)


def need_of(planned: Mapping[str, Any], machine: str, phases: Mapping[int, str]) -> Need | None:
    """Return what a plan (of POST /plan/generate) puts on a machine; `phases` are its stages', by id."""
    mine = [stage for stage in planned.get("stages", []) if stage.get("node_id") == machine]
    if not mine:
        return None
    return Need(
        sum(stage["weight_bytes"] + stage["kv_bytes"] for stage in mine if stage["device_type"] == "cpu"),
        sum(stage["weight_bytes"] for stage in mine),
        all(phases.get(stage["stage_id"]) == "ready" for stage in mine),
    )


def check_memory(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, where: str, system: System, *, why_no_need: str
) -> list[CheckResult]:
    """Judge memory against the plan, Docker's share of it, and disk."""
    return [
        _check_available(facts, docker, need, where, why_no_need),
        *_check_cap(facts, docker, need, where, system),
        _check_disk(facts, need, where, system),
    ]


def _check_available(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, where: str, why_no_need: str
) -> CheckResult:
    free_bytes = facts.available_bytes
    if docker is not None and docker.is_desktop and docker.memory_bytes:
        free_bytes = min(free_bytes, docker.memory_bytes)
    why = "the system kills a stage that needs more memory, or swaps and makes it very slow"
    cure = "close other programs, set a shorter context (NOODLE_CONTEXT_LENGTH in .env), or see `noodle plan`"
    if need is None:
        if free_bytes < PROCESS_BYTES:
            what = f"{_gigabytes(free_bytes)} of memory is free, before any layer is loaded."
            return warning("memory", where, what, why=why, cure=cure)
        return skipped(
            "memory", where, f"{_gigabytes(free_bytes)} is free; what the plan needs is unknown: {why_no_need}"
        )
    if need.is_loaded:
        return ok("memory", where, f"its layers are loaded; {_gigabytes(free_bytes)} is free beside them")
    if free_bytes < need.cpu_bytes:
        what = f"The plan puts {_gigabytes(need.cpu_bytes)} here, but only {_gigabytes(free_bytes)} is free."
        return error("memory", where, what, why=why, cure=cure)
    return ok("memory", where, f"the plan needs {_gigabytes(need.cpu_bytes)}, {_gigabytes(free_bytes)} is free")


def _check_cap(
    facts: MemoryFacts, docker: DockerFacts | None, need: Need | None, where: str, system: System
) -> list[CheckResult]:
    """Judge the memory of Docker Desktop; WSL gives it half of the machine's by default."""
    if docker is None or not docker.is_desktop or not facts.total_bytes or not docker.memory_bytes:
        return []
    shown = f"Docker may use {_gigabytes(docker.memory_bytes)} of {_gigabytes(facts.total_bytes)}"
    enough_bytes = CAP_SHARE * facts.total_bytes
    if need is not None:
        enough_bytes = min(enough_bytes, need.cpu_bytes + PROCESS_BYTES)
    if docker.memory_bytes >= enough_bytes:
        return [ok("memory cap", where, shown)]
    gigabytes = max(1, int(0.8 * facts.total_bytes / GIGABYTE))
    cure = WSL_CURE.format(gigabytes=gigabytes) if system == "windows" else "raise the memory in Docker's settings"
    why = "the stage sees only this much, and the planner gives it fewer layers"
    return [(error if need else warning)("memory cap", where, f"{shown}.", why=why, cure=cure)]


def _check_disk(facts: MemoryFacts, need: Need | None, where: str, system: System) -> CheckResult:
    if facts.disk_free_bytes is None:
        return skipped("disk", where, f"the free space on the disk of {facts.disk_path} is unknown")
    needed_bytes = SPARE_BYTES + (need.weight_bytes if need is not None else 0)
    needed_bytes += IMAGE_BYTES if facts.has_images is False else 0
    shown = f"{_gigabytes(facts.disk_free_bytes)} free on the disk of {facts.disk_path}"
    if facts.disk_free_bytes >= needed_bytes:
        return ok("disk", where, shown)
    what = f"{shown}, but images and weights may need {_gigabytes(needed_bytes)}."
    why = "without enough space a build or download stops in the middle"
    cure = "docker system prune   (removes what no container uses)" if system != "other" else "free some space there"
    return (error if facts.disk_free_bytes < SPARE_BYTES else warning)("disk", where, what, why=why, cure=cure)


def _free_bytes(path: Path) -> int | None:
    """Return the free space on the disk of a path, or of its nearest existing parent."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def _gigabytes(byte_count: float) -> str:
    return f"{byte_count / GIGABYTE:.1f} GB"
