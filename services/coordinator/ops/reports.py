"""`/reports` stores the reports of `noodle bench` and `noodle profile`, lists them, and returns each as it came."""

from __future__ import annotations

import datetime
import logging
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from flask import Flask, Response

from noodle.cluster.reports import KINDS, MAXIMUM_REPORT_BYTES, KeptReport, ReportHead, ReportList
from noodle.errors import InvalidRequest, NoodleError, NotFound
from noodle.web.service import json_body, json_response
from services.coordinator.api.body import decode_object
from services.coordinator.api.openapi import ANY_OBJECT, BODY_ERRORS, Operation
from services.coordinator.ops.records import Record, RecordStore, encoded

log = logging.getLogger(__name__)

MAXIMUM_REPORTS = 200
REPORTS_FILE_BYTES = 32 << 20  # of each of the two files
REPORT_FILE_PATTERN = re.compile(r"\d{8}-\d{6}-\d{6}-([a-z]+)-[0-9a-f]{6}")  # stem of a file with one report

OPERATIONS = (
    Operation(
        "POST /reports/{kind}",
        summary="Store a report",
        description="Stores a report of `noodle bench` or `noodle profile`.",
        errors=(401, *BODY_ERRORS, 404, 500),
        body=ANY_OBJECT,
        other_answers={201: ("Stored.", KeptReport)},
    ),
    Operation(
        "GET /reports",
        summary="List the stored reports",
        description="Returns the heads of the stored reports, newest first.",
        answer=ReportList,
        errors=(401,),
    ),
    Operation(
        "GET /reports/{report_id}",
        summary="Read one report",
        description="Returns a report as it was sent.",
        answer=ANY_OBJECT,
        errors=(401, 404),
    ),
)

Content = TypeVar("Content")


class StoredReport(Record, Generic[Content], frozen=True, kw_only=True):
    """One report as it is stored; read with its content as raw JSON, or as its head alone."""

    kind: str
    byte_count: int
    content: Content


def install_report_routes(app: Flask, folder: Path, require_client: Callable[[], object]) -> None:
    """The routes; `require_client` raises for anonymous requests."""
    store = RecordStore(folder / "reports.jsonl", REPORTS_FILE_BYTES)
    adopt_report_files(folder, store)

    @app.post("/reports/<kind>")
    def add_report(kind: str) -> Response:
        require_client()
        if kind not in KINDS:
            raise NotFound(
                f"There are no reports of the kind {kind[:40]!r}.", cure=f"The kinds are {', '.join(KINDS)}."
            )
        document = decode_object(json_body(MAXIMUM_REPORT_BYTES, f"A report has at most {MAXIMUM_REPORT_BYTES} bytes."))
        head = checked_head(document)
        report_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}-{kind}-{secrets.token_hex(3)}"
        report = _stored_report(report_id, kind, document)
        try:
            store.append([report])
        except OSError as error:
            raise NoodleError(
                f"The report cannot be written to {folder}: {error.strerror or error}.",
                cure="Free disk space, or set NOODLE_REPORTS_DIR on the coordinator to another folder.",
            ) from error
        return json_response(_listed(report, head), 201)

    @app.get("/reports")
    def list_reports() -> Response:
        require_client()
        reports = store.newest(StoredReport[ReportHead], MAXIMUM_REPORTS)
        return json_response(ReportList(tuple(_listed(report, report.content) for report in reports)))

    @app.get("/reports/<report_id>")
    def read_report(report_id: str) -> Response:
        require_client()
        report = store.find(StoredReport[msgspec.Raw], report_id, MAXIMUM_REPORTS)
        if report is None:
            raise NotFound(f"There is no report {report_id[:80]!r}.", cure="GET /reports lists them.")
        return Response(bytes(report.content), mimetype="application/json")


def checked_head(document: dict[str, Any]) -> ReportHead:
    """The head of a report; raises InvalidRequest."""
    try:
        return msgspec.convert(document, ReportHead)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        raise InvalidRequest(
            f"The report's head is wrong: {field}: {problem}.", cure="Its fields are short strings.", param=field
        ) from error


def adopt_report_files(folder: Path, store: RecordStore) -> None:
    """Move reports that an older noodle wrote into files of their own into the store, oldest first."""
    try:
        for path in sorted(folder.glob("*.json")):
            if match := REPORT_FILE_PATTERN.fullmatch(path.stem):
                _adopt(path, match[1], store)
    except OSError as error:
        log.warning("the reports of an older noodle in %s cannot be moved to its store: %s", folder, error)


def _adopt(path: Path, kind: str, store: RecordStore) -> None:
    try:
        report = _stored_report(path.stem, kind, msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
    except (RecursionError, UnicodeDecodeError, msgspec.MsgspecError, InvalidRequest) as error:
        log.warning("%s is damaged and counts as absent: %s", path, error)
        return
    store.append([report])
    path.unlink()


def _stored_report(report_id: str, kind: str, document: dict[str, Any]) -> StoredReport[msgspec.Raw]:
    content = encoded(document)
    return StoredReport(entry_id=report_id, kind=kind, byte_count=len(content), content=msgspec.Raw(content))


def _listed(report: StoredReport[Any], head: ReportHead) -> KeptReport:
    return KeptReport(
        id=report.entry_id, kind=report.kind, byte_count=report.byte_count, **msgspec.structs.asdict(head)
    )
