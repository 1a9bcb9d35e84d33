"""Who is there, who may come back and who is gone; pure, time is given.

A stage that falls silent keeps its layers for a while, for it may come back (design D14); one that says goodbye does
not. Whoever joins while another may still come back waits: layers move once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noodle.cluster.plan import MachineReport, Plan


@dataclass(frozen=True)
class Attendance:
    """Of one look: the machines to plan for, and how they differ from those of the plan; by stage id."""

    machines: tuple[MachineReport, ...]  # that are there and stay
    away: tuple[int, ...]  # of the plan, and may come back
    gone: tuple[int, ...]  # of the plan, and do not
    joined: tuple[int, ...]  # not of the plan

    @property
    def is_settled(self) -> bool:
        """Whether the plan's stages are those to plan for, as far as one can know now."""
        return bool(self.away) or not (self.gone or self.joined)


class AttendanceBook:
    """Remembers since when each stage is away."""

    def __init__(self, return_seconds: float) -> None:
        self._return_seconds = return_seconds
        self._away_since: dict[int, float] = {}

    def look(self, plan: Plan | None, reports: Sequence[MachineReport], stage_count: int, now: float) -> Attendance:
        """Note who is there now; at most `stage_count` machines are planned for, those of the plan first."""
        planned = [stage.stage_id for stage in plan.stages] if plan else []
        leaving = {report.stage_id for report in reports if report.leaving}
        staying = sorted(
            (report for report in reports if not report.leaving),
            key=lambda report: (report.stage_id not in planned, report.stage_id),
        )
        machines = tuple(sorted(staying[:stage_count], key=lambda report: report.stage_id))
        there = {report.stage_id for report in machines}
        missing = [stage_id for stage_id in planned if stage_id not in there]
        self._away_since = {stage_id: self._away_since.get(stage_id, now) for stage_id in missing}
        gone = tuple(
            stage_id
            for stage_id in missing
            if stage_id in leaving or now - self._away_since[stage_id] >= self._return_seconds
        )
        away = tuple(stage_id for stage_id in missing if stage_id not in gone)
        joined = tuple(sorted(there - set(planned))) if plan else ()
        return Attendance(machines, away, gone, joined)
