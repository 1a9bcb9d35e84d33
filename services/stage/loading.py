"""Loads the layers that a plan gives this stage, with room for their KV rows."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from noodle.cluster.plan import MINIMUM_SESSION_TOKENS, MachineReport, Plan
from noodle.config.settings import StageConfig
from noodle.errors import PlanDoesNotFit
from noodle.model.formats import FORMAT_BY_DTYPE
from services.stage.executors.base import Fetch, ReadProgress
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
from services.stage.selection.device import free_memory
from services.stage.stage import Stage
from services.stage.worker.manual_sessions import FORWARD_KV_BYTES, ForwardSessions
from services.stage.worker.worker import Role

log = logging.getLogger(__name__)

KV_SHARE_OF_FREE_BYTES = 0.5  # unless NOODLE_KV_BYTES is set


def load_role(
    stage: Stage,
    report: MachineReport,
    plan: Plan,
    index: int,
    folder: Path,
    *,
    progress: ReadProgress,
    fetch: Fetch,
) -> Role:
    """Load the layers of the plan's stage `index`; the old ones are dropped first when both do not fit."""
    config, mine = stage.config, plan.stages[index]
    if stage.role is not None and free_memory(report.device, report.executor).free_bytes < 2 * mine.weight_bytes:
        log.info("the old and the new layers do not fit side by side: dropping the old ones first")
        stage.become(0, None)
    weights = mine.weights or FORMAT_BY_DTYPE[mine.dtype]  # a plan that names no weights is for transformers
    model_slice = load_by(
        Candidate(mine.executor, weights, mine.kv_dtype or weights, mine.dtype),
        folder,
        mine.start_layer,
        mine.end_layer,
        device=report.device,
        threads=report.threads,
        context_length=plan.context_length,
        cache_dir=config.cache_dir,
        progress=progress,
        fetch=fetch,
    )
    stages_here = sum(other.machine == mine.machine for other in plan.stages)
    free_bytes = free_memory(report.device, report.executor).free_bytes
    kv_bytes = config.kv_bytes or int(free_bytes * KV_SHARE_OF_FREE_BYTES / stages_here)
    check_kv_room(config, plan, index, kv_bytes, model_slice.kv_bytes_per_token)
    stage.kv_budget_bytes = kv_bytes
    forward_kv_bytes = min(FORWARD_KV_BYTES, kv_bytes)
    model_slice.set_kv_budget(kv_bytes + forward_kv_bytes)  # neither kind of session can take the other's room
    forwards = ForwardSessions(forward_kv_bytes, model_slice.kv_bytes_per_token, plan.context_length)
    return Role(plan, index, model_slice, None, forwards)


def check_kv_room(config: StageConfig, plan: Plan, index: int, kv_bytes: int, bytes_per_token: int) -> None:
    """Raise PlanDoesNotFit unless the KV rows of one short session fit: a stage with less would be useless."""
    needed_tokens = min(MINIMUM_SESSION_TOKENS, plan.context_length)
    needed_bytes = needed_tokens * bytes_per_token
    if kv_bytes >= needed_bytes:
        return
    mine = plan.stages[index]
    budget = f"NOODLE_KV_BYTES={kv_bytes}" if config.kv_bytes else f"{kv_bytes} bytes, its share of what is free,"
    raise PlanDoesNotFit(
        f"Stage {mine.stage_id} on {mine.machine} has room for KV rows of {kv_bytes // max(1, bytes_per_token)} tokens "
        f"({budget} at {bytes_per_token} bytes a token in its {mine.end_layer - mine.start_layer} layers); "
        f"the shortest session has {needed_tokens}.",
        cure=f"Set NOODLE_KV_BYTES to at least {needed_bytes}, or leave it unset."
        if config.kv_bytes
        else "Free memory on this machine, or give the stage fewer layers (NOODLE_SPLIT).",
    )


def return_freed_memory() -> None:
    """Give freed memory back to the system; glibc keeps much of what loading and measuring took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
