"""The head of a report of `noodle bench` or `noodle profile`, the only part that the coordinator reads.

A report is one JSON object; its other fields belong to the command that made it.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

ReportKind = Literal["bench", "profile"]
KINDS: tuple[str, ...] = get_args(ReportKind)
MAXIMUM_REPORT_BYTES = 1 << 20  # the commands' largest report has a tenth of it

HeadText = Annotated[str, Meta(max_length=200)]


class ReportHead(Struct, frozen=True):
    """The fields that a list of reports shows."""

    made_at: HeadText = ""  # ISO 8601, UTC, by the clock of the machine that measured
    machine: HeadText = ""  # the one that measured
    model: HeadText = ""
    headline: HeadText = ""  # the result in a few words


class KeptReport(ReportHead, frozen=True, kw_only=True):
    """One stored report in a list."""

    id: str
    kind: str
    byte_count: int


class ReportList(Struct, frozen=True):
    """The answer to GET /reports, newest first."""

    reports: tuple[KeptReport, ...] = ()
