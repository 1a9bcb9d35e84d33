"""Whether the model fits into the machines, for `noodle doctor`: asks the coordinator, and tells what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from noodle.errors import NoodleError
from services.cli.client.http_client import error_in, get_json, post_for_answer
from services.cli.doctor.outcome import Outcome, error, ok, skipped
from services.cli.doctor.situation import Situation

PLAN_SECONDS = 8.0
HEALTH_SECONDS = 3.0


class Planned(Struct, frozen=True):
    """The plan as the planner answers it, or why there is none."""

    answer: dict[str, Any] | None = None
    refusal: str = ""  # it does not fit
    cures: tuple[str, ...] = ()
    reason: str = ""  # it could not be asked
    phases: dict[int, str] = {}
    model: str = ""  # as clients call it


def ask_plan(situation: Situation) -> Planned:
    """The plan for the machines that are registered; raises nothing."""
    if not situation.coordinator_url:
        return Planned(reason="this machine has no coordinator yet")
    if not situation.token:
        return Planned(reason="no cluster token is known here")
    url = situation.coordinator_url
    health: dict[str, Any] = {}
    try:
        _, health = get_json(f"{url}/health", situation.token, HEALTH_SECONDS)
        status, answer = post_for_answer(f"{url}/plan/generate", {}, situation.token, PLAN_SECONDS)
    except NoodleError as problem:
        if health.get("status") == "failed":  # it says why itself; for very many layers the planner answers late
            return Planned(refusal=str(health.get("detail")), phases=_phases(health))
        return Planned(reason=problem.message)
    phases = _phases(health)
    if status != 200:
        refused = error_in(answer)
        cures = tuple(str(cure["text"]) for cure in (answer.get("short") or {}).get("cures", ()))
        return Planned(refusal=refused.message if refused else f"answered {status}", cures=cures, phases=phases)
    return Planned(answer, phases=phases, model=str(health.get("model") or answer["plan"]["model"]))


def _phases(health: Mapping[str, Any]) -> dict[int, str]:
    return {
        int(stage["stage_id"]): str(stage.get("phase", ""))
        for stage in health.get("stages") or ()
        if isinstance(stage, dict) and isinstance(stage.get("stage_id"), int)
    }


def check_plan(planned: Planned, where: str) -> Outcome:
    """Whether the model fits into the machines."""
    if planned.answer is not None:
        plan = planned.answer["plan"]
        layers = ", ".join(
            f"{stage['start_layer']} to {stage['end_layer'] - 1} on {stage['node_id']}" for stage in plan["stages"]
        )
        return ok("plan", where, f"{planned.model} fits: layers {layers}")
    if planned.refusal:
        cures = "\n".join(["each of these alone cures it:", *planned.cures, "noodle plan   (shows all figures)"])
        why = "no stage loads anything until it fits"
        return error("plan", where, f"The model does not fit. {planned.refusal}", why=why, cure=cures)
    return skipped("plan", where, f"there is no plan to look at: {planned.reason}")
