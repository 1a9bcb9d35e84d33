"""What a report of `noodle bench` or `noodle profile` says at its head; the coordinator reads no more of it.

A report is one JSON object; its other fields belong to the command that made it.
"""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

ReportKind = Literal["bench", "profile"]
KINDS: tuple[str, ...] = get_args(ReportKind)
MAXIMUM_REPORT_BYTES = 1 << 20  # the largest that the commands make is a tenth of it


class ReportHead(Struct, frozen=True):
    """The fields of a report that a list of reports shows; all texts."""

    made_at: str = ""  # ISO 8601, UTC, by the clock of the machine that measured
    machine: str = ""  # the one that measured
    model: str = ""
    headline: str = ""  # what came out, in a few words


class KeptReport(ReportHead, frozen=True, kw_only=True):
    """A line of the list of kept reports."""

    id: str
    kind: str
    byte_count: int


class ReportList(Struct, frozen=True):
    """What GET /reports answers, the newest first."""

    reports: tuple[KeptReport, ...] = ()
