"""What a check of `noodle doctor` comes to, and how all of them are told; values in, text out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

Status = Literal["ok", "warning", "error", "skipped"]
WIDTH = 118
LABELS: dict[Status, str] = {"ok": "ok", "warning": "WARNING", "error": "ERROR", "skipped": "skipped"}
INDENT = " " * 21


class Outcome(Struct, frozen=True):
    """One check: in order, a finding (warning or error) with its cure, or why it could not be made."""

    check: str
    status: Status
    where: str  # the machine
    what: str
    why: str = ""  # it matters
    cure: str = ""  # the command, for the system that it is to be run on


class Report(Struct, frozen=True):
    """All of them."""

    machine: str
    role: str
    system: str
    version: str
    seconds: float
    outcomes: tuple[Outcome, ...]

    @property
    def is_healthy(self) -> bool:
        """No error; warnings do not count."""
        return all(outcome.status != "error" for outcome in self.outcomes)


def ok(check: str, where: str, what: str) -> Outcome:
    """In order."""
    return Outcome(check, "ok", where, what)


def warning(check: str, where: str, what: str, *, why: str, cure: str) -> Outcome:
    """It works, but less than one may think."""
    return Outcome(check, "warning", where, what, why, cure)


def error(check: str, where: str, what: str, *, why: str, cure: str) -> Outcome:
    """It does not work."""
    return Outcome(check, "error", where, what, why, cure)


def skipped(check: str, where: str, reason: str) -> Outcome:
    """It could not be looked at."""
    return Outcome(check, "skipped", where, reason)


def text_of(report: Report) -> str:
    """The whole report, as it is printed."""
    head = f"{report.machine} ({report.role}, {report.system}), noodle {report.version}"
    lines = [head, ""]
    for outcome in report.outcomes:
        lines += _lines(outcome, report.machine)
    return "\n".join([*lines, "", _summary(report.outcomes, report.seconds)])


def _lines(outcome: Outcome, machine: str) -> list[str]:
    where = "" if outcome.where == machine else f"{outcome.where}: "
    head = f"{LABELS[outcome.status]:8} {outcome.check:11} "
    lines = _wrapped(f"{where}{outcome.what}", head)
    if outcome.why:
        lines += _wrapped(outcome.why, f"{INDENT}why:  ")
    if outcome.cure:
        first, *more = outcome.cure.splitlines()
        lines += [f"{INDENT}cure: {first}", *(f"{INDENT}      {line}" for line in more)]  # to be copied: not wrapped
    return lines


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    counts = {status: _count(outcomes, status) for status in LABELS}
    return (
        f"{_counted(counts['error'], 'error')}, {_counted(counts['warning'], 'warning')}, {counts['ok']} in order, "
        f"{counts['skipped']} skipped, in {seconds:.1f} s."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _count(outcomes: Iterable[Outcome], status: Status) -> int:
    return sum(outcome.status == status for outcome in outcomes)
