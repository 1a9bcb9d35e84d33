"""What the loop of generate.py is told by other threads, and what it says of itself; values only."""

from __future__ import annotations

from dataclasses import dataclass, field

from noodle.cluster.plan import Plan
from noodle.errors import NoodleError
from services.coordinator.engine.pipeline import PipelineEvent
from services.coordinator.engine.sequence import PlanLimits, Session


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request came in."""

    session: Session


@dataclass(frozen=True, slots=True)
class Ended:
    """Nobody wants it any more, or its text is complete."""

    request_id: str
    outcome: str
    error: NoodleError | None


@dataclass(frozen=True, slots=True)
class Activate:
    """Compute by this plan."""

    plan: Plan
    limits: PlanLimits
    coordinator_epoch: int


@dataclass(frozen=True, slots=True)
class LimitsChanged:
    """The same plan, with other room for KV rows."""

    limits: PlanLimits


@dataclass(frozen=True, slots=True)
class StandBy:
    """Another coordinator leads."""

    error: NoodleError


LoopEvent = PipelineEvent | Submitted | Ended | Activate | LimitsChanged | StandBy


@dataclass(slots=True)
class LoopState:
    """What the loop does now, for /health."""

    plan: Plan | None = None
    up: bool = False
    detail: str = "no plan is active"
    boot_ids: tuple[str, ...] = field(default=())
