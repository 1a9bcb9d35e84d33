"""Reports of `noodle bench` and `noodle profile`: into files here, to the coordinator, and back from there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noodle.cluster.reports import KeptReport, ReportKind, ReportList
from noodle.errors import ConfigurationError, LinkLost, NoodleError
from services.cli.client.http_client import error_in, get_json, post_json
from services.cli.client.target import Target

SECONDS = 30.0  # for the coordinator to keep, list or give a report

ReportT = TypeVar("ReportT", bound=Struct)


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError when files can not be written there: before minutes of measuring, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {folder} can not be made: {error.strerror}.", cure="Name another one with --output."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"Nothing can be written into the folder {folder}.", cure="Name another one with --output."
        )


def write_report(folder: Path, name: str, report: Struct) -> Path:
    """Write a report as JSON; gives the file."""
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return path


def keep_report(target: Target, kind: ReportKind, report: Struct) -> str:
    """Give a report to the coordinator; its id there. Raises NoodleError."""
    body = msgspec.to_builtins(report)
    answer = post_json(f"{target.url}/reports/{kind}", body, target.credential, SECONDS)
    return str(answer.get("id", ""))


def list_reports(target: Target, kind: ReportKind, *, as_json: bool) -> int:
    """Print what the coordinator keeps of one kind, the newest first."""
    answer = _get(target, "/reports")
    try:
        kept = [report for report in msgspec.convert(answer, ReportList).reports if report.kind == kind]
    except msgspec.ValidationError as error:
        raise LinkLost(f"{target.url}/reports answered no list of reports: {error}.") from error
    if as_json:
        print_json([msgspec.to_builtins(report) for report in kept])
    elif kept:
        _print_list(kept)
    else:
        print(f"{target.url} keeps no report of `noodle {kind}`.")
    return 0


def read_report(target: Target, report_id: str, report_type: type[ReportT]) -> ReportT:
    """A kept report; raises NoodleError when there is none of this id and kind."""
    answer = _get(target, f"/reports/{report_id}")
    try:
        return msgspec.convert(answer, report_type)
    except msgspec.ValidationError as error:
        raise LinkLost(
            f"The report {report_id} is not what this command makes: {error}.", cure="See its list for the right id."
        ) from error


def print_json(value: object) -> None:
    """As indented JSON on standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def print_table(table: Table) -> None:
    """On a terminal as it fits, elsewhere without breaking lines."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200  # a pipe has no edge to break lines at
    console.print(table)


def _get(target: Target, path: str) -> dict[str, Any]:
    status, answer = get_json(target.url + path, target.credential, SECONDS)
    if status >= 400:
        raise error_in(answer) or NoodleError(f"{target.url}{path} answered {status}.")
    return answer


def _print_list(kept: list[KeptReport]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("id", "made at", "machine", "model", "what came out"):
        table.add_column(title)
    for report in kept:
        table.add_row(*map(escape, (report.id, report.made_at, report.machine, report.model, report.headline)))
    print_table(table)
