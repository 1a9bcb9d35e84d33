"""What /health says: status, progress, what is being waited for, and who computes which layers; knows no HTTP."""

from __future__ import annotations

from typing import Any

from noodle import __version__
from noodle.model.formats import FORMAT_BY_DTYPE
from services.coordinator.coordinator import Coordinator
from services.coordinator.leadership import progress_of, waiting_for, warnings_of


def health_of(engine: Coordinator) -> tuple[str, dict[str, Any]]:
    """Status and everything that /health says: what is being waited for, and who computes what."""
    view, leads, loop = engine.leadership.view, engine.leadership.leads, engine.loop.state
    up = loop.up and engine.loaded is not None
    waits = [] if engine.loaded else [engine.detail]  # the others wait for the model's files too
    waits += waiting_for(view, leads, loop.detail, loop.up)
    failed = engine.failure or next((state.detail for state in view.stages.values() if state.phase == "failed"), "")
    if not failed and view.planner is not None and view.planner.phase == "failed":
        failed = view.planner.detail
    status = "ready" if up else "failed" if failed else "starting"
    return status, {
        "service": "coordinator",
        "status": status,
        "version": __version__,
        "detail": failed or (waits[0] if waits else "ready"),
        "progress": progress_of(view, up),
        "waiting_for": waits,
        "model": engine.loaded.served.names[0] if engine.loaded else None,
        "plan": view.plan.version if view.plan else None,
        "plan_reason": view.plan.reason if view.plan else None,
        "context_length": loop.plan.context_length if loop.plan else None,
        "warnings": warnings_of(view),
        "leads": leads,
        "kept_kv_tokens": engine.loop.kept_rows,
        "stages": stages_of(engine),
    }


def stages_of(engine: Coordinator) -> list[dict[str, Any]]:
    """One line a stage: its layers by the plan, and what it says of itself."""
    view = engine.leadership.view
    assigned = {stage.stage_id: stage for stage in view.plan.stages} if view.plan else {}
    last = view.plan.stages[-1] if view.plan and view.plan.stages else None
    lines = []
    for stage_id in sorted(assigned.keys() | view.stages.keys()):
        line: dict[str, Any] = {"stage_id": stage_id}
        if (stage := assigned.get(stage_id)) is not None:
            line |= {
                "machine": stage.machine,
                "url": stage.url,
                "layers": [stage.start_layer, stage.end_layer],
                "dtype": stage.dtype,
                "executor": stage.executor,
                "weights": stage.weights or FORMAT_BY_DTYPE[stage.dtype],
                "kv_dtype": stage.kv_dtype or FORMAT_BY_DTYPE[stage.dtype],
                "hop_dtypes": list(stage.may_hand_on) if stage is not last else [],
            }
        state = view.stages.get(stage_id)
        line |= {"phase": "silent"} if state is None else {
            "phase": state.phase,
            "detail": state.detail,
            "progress": state.progress,
            "machine": state.machine,
            "device": state.device,
            "device_name": state.device_name,
            "threads": state.threads,
            "choice": state.choice,
            "weight_bytes": state.weight_bytes,
            "kv_bytes_held": state.kv_bytes_held,
            "kv_budget_bytes": state.kv_budget_bytes,
            "kv_bytes_per_token": state.kv_bytes_per_token,
            "sessions": state.sessions,
        }  # fmt: skip
        lines.append(line)
    return lines
