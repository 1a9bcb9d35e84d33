"""The result of each check, and the report that `noodle doctor` prints."""

from __future__ import annotations

import textwrap
from typing import Literal

from msgspec import Struct, field

from services.cli.client.reports import counted

Status = Literal["ok", "warning", "error", "skipped"]
WIDTH = 118
LABELS: dict[Status, str] = {"ok": "ok", "warning": "WARNING", "error": "ERROR", "skipped": "skipped"}
INDENT = " " * 21


class CheckResult(Struct, frozen=True):
    """One check: ok, a finding (warning or error) with its cure, or the reason why it was skipped."""

    check: str
    status: Status
    where: str  # the machine
    what: str
    why: str = ""  # it matters
    cure: str = ""  # the command, for the system of that machine


class Report(Struct, frozen=True, kw_only=True):
    """All results of one run."""

    machine: str
    role: str
    system: str
    version: str
    seconds: float
    results: tuple[CheckResult, ...] = field(name="outcomes")

    @property
    def is_healthy(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return all(result.status != "error" for result in self.results)


def ok(check: str, where: str, what: str) -> CheckResult:
    return CheckResult(check, "ok", where, what)


def warning(check: str, where: str, what: str, *, why: str, cure: str) -> CheckResult:
    return CheckResult(check, "warning", where, what, why=why, cure=cure)


def error(check: str, where: str, what: str, *, why: str, cure: str) -> CheckResult:
    return CheckResult(check, "error", where, what, why=why, cure=cure)


def skipped(check: str, where: str, reason: str) -> CheckResult:
    return CheckResult(check, "skipped", where, reason)


def text_of(report: Report) -> str:
    lines = [f"{report.machine} ({report.role}, {report.system}), noodle {report.version}", ""]
    for result in report.results:
        lines += _lines(result, report.machine)
    counts = {status: sum(result.status == status for result in report.results) for status in LABELS}
    summary = (
        f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}, {counts['ok']} ok, "
        f"{counts['skipped']} skipped, in {report.seconds:.1f} s."
    )
    return "\n".join([*lines, "", summary])


def _lines(result: CheckResult, machine: str) -> list[str]:
    where = "" if result.where == machine else f"{result.where}: "
    lines = _wrapped(f"{where}{result.what}", f"{LABELS[result.status]:8} {result.check:11} ")
    if result.why:
        lines += _wrapped(result.why, f"{INDENT}why:  ")
    if result.cure:
        first, *more = result.cure.splitlines()
        lines += [f"{INDENT}cure: {first}", *(f"{INDENT}      {line}" for line in more)]  # not wrapped, to be copied
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
