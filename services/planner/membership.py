"""Track which stages are present, which may return and which are gone.

A silent stage keeps its layers for a while because it may return; a stage that announces that it leaves does not. A
stage that joins while another may still return waits, so that layers move once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noodle.cluster.plan import MachineReport, Plan


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The machines to plan for, and how they differ from the plan's; by stage id."""

    machines: tuple[MachineReport, ...]  # present, and not leaving
    away: tuple[int, ...]  # in the plan, silent, may return
    gone: tuple[int, ...]  # in the plan, leaving or silent for too long
    joined: tuple[int, ...]  # not in the plan

    @property
    def is_settled(self) -> bool:
        """Whether the plan's stages are still the ones to plan for, as far as is known."""
        return bool(self.away) or not (self.gone or self.joined)


class MembershipTracker:
    """Remembers since when each stage has been away."""

    def __init__(self, return_seconds: float) -> None:
        self._return_seconds = return_seconds
        self._away_since: dict[int, float] = {}

    def update(self, plan: Plan | None, reports: Sequence[MachineReport], stage_count: int, now: float) -> Membership:
        """Note who is present; at most `stage_count` machines are chosen, those in the plan first."""
        planned = [stage.stage_id for stage in plan.stages] if plan else []
        leaving = {report.stage_id for report in reports if report.leaving}
        staying = sorted(
            (report for report in reports if not report.leaving),
            key=lambda report: (report.stage_id not in planned, report.stage_id),
        )
        machines = tuple(sorted(staying[:stage_count], key=lambda report: report.stage_id))
        present = {report.stage_id for report in machines}
        missing = [stage_id for stage_id in planned if stage_id not in present]
        self._away_since = {stage_id: self._away_since.get(stage_id, now) for stage_id in missing}
        gone = tuple(
            stage_id
            for stage_id in missing
            if stage_id in leaving or now - self._away_since[stage_id] >= self._return_seconds
        )
        away = tuple(stage_id for stage_id in missing if stage_id not in gone)
        joined = tuple(sorted(present - set(planned))) if plan else ()
        return Membership(machines=machines, away=away, gone=gone, joined=joined)
