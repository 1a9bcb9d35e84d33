"""Reports of `noodle bench` and `noodle profile` as files, on the coordinator, and printed; tables of all commands."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noodle.cluster.reports import ReportKind, ReportList
from noodle.errors import ConfigurationError, LinkLost, NoodleError
from services.cli.client.http_client import error_in, get_json, post_json
from services.cli.client.target import Target

SECONDS = 30.0  # the coordinator's answer when a report is stored, listed or read
PIPE_COLUMNS = 200  # a pipe has no edge to wrap lines at

ReportT = TypeVar("ReportT", bound=Struct)


def output_folder(name: str | None) -> Path:
    """Return the folder for a report's files; raises ConfigurationError before the measuring if it is not writable."""
    folder = Path(name or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {folder} cannot be made: {error.strerror}.", cure="Name another one with --output."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"The folder {folder} is not writable.", cure="Name another one with --output.")
    return folder


def write_and_print(
    kind: ReportKind,
    report: ReportT,
    folder: Path,
    *,
    as_json: bool,
    print_report: Callable[[ReportT], None],
    draw: Callable[[ReportT, Path], str],
) -> None:
    path = folder / f"noodle-{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if as_json:
        print_json(report)
    else:
        print_report(report)
    print(f"Written: {path}", file=sys.stderr)
    print(draw(report, path.with_suffix(".png")), file=sys.stderr)


def store_report(target: Target, kind: ReportKind, report: Struct) -> str:
    """Store a report on the coordinator and return its id there; raises NoodleError."""
    body = msgspec.to_builtins(report)
    answer = post_json(f"{target.url}/reports/{kind}", body, target.credential, SECONDS)
    return str(answer.get("id", ""))


def wants_stored(options: argparse.Namespace, measuring_options: Sequence[str]) -> bool:
    """Return whether --list or --show is given; raises ConfigurationError if an option for measuring is given too."""
    if not options.list and options.show is None:
        return False
    given = [f"--{name.replace('_', '-')}" for name in measuring_options if getattr(options, name) is not None]
    if given:
        raise ConfigurationError(
            f"{given[0]} is for measuring, and --list and --show measure nothing.", cure="Leave one of them out."
        )
    return True


def print_stored(
    options: argparse.Namespace,
    target: Target,
    kind: ReportKind,
    report_type: type[ReportT],
    print_report: Callable[[ReportT], None],
) -> int:
    """Print the list of stored reports, or the one that --show names; raises NoodleError if it is of another kind."""
    if options.list:
        return _print_list(target, kind, as_json=options.json)
    answer = _get(target, f"/reports/{options.show}")
    try:
        report = msgspec.convert(answer, report_type)
    except msgspec.ValidationError as error:
        raise LinkLost(
            f"The report {options.show} is not one of this command: {error}.", cure="--list shows the right ids."
        ) from error
    if options.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table with the columns in `right` aligned right; only a terminal wraps its lines."""
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(table)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 thread, 2 threads."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def _get(target: Target, path: str) -> dict[str, Any]:
    status, answer = get_json(target.url + path, target.credential, SECONDS)
    if status >= 400:
        raise error_in(answer) or NoodleError(f"{target.url}{path} answered {status}.")
    return answer


def _print_list(target: Target, kind: ReportKind, *, as_json: bool) -> int:
    """Print what the coordinator stores of one kind, the newest first."""
    answer = _get(target, "/reports")
    try:
        kept = [report for report in msgspec.convert(answer, ReportList).reports if report.kind == kind]
    except msgspec.ValidationError as error:
        raise LinkLost(f"{target.url}/reports answered no list of reports: {error}.") from error
    if as_json:
        print_json(kept)
    elif kept:
        rows = [(each.id, each.made_at, each.machine, each.model, each.headline) for each in kept]
        print_table(("id", "made at", "machine", "model", "result"), rows)
    else:
        print(f"{target.url} stores no report of `noodle {kind}`.")
    return 0
