"""Reports of `noodle bench` and `noodle profile`: kept as files, bounded in number and bytes, the oldest go first.

Knows a report's head, not what was measured. A report's id is its file's name and begins with the time it came.
"""

from __future__ import annotations

import datetime
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from flask import Flask, Response

from noodle.cluster.reports import KINDS, MAXIMUM_REPORT_BYTES, KeptReport, ReportHead, ReportList
from noodle.errors import InvalidRequest, NoodleError, NotFound
from noodle.web.service import json_body, json_response
from services.coordinator.api.request_body import decode_object

MAXIMUM_REPORTS = 200
MAXIMUM_REPORTS_BYTES = 64 << 20  # of all together
MAXIMUM_HEAD_CHARACTERS = 200  # of each text in a report's head
ID_PATTERN = re.compile(r"\d{8}-\d{6}-\d{6}-([a-z]+)-[0-9a-f]{6}")


def install_report_routes(app: Flask, folder: Path, require_client: Callable[[], object]) -> None:
    """The routes; `require_client` raises for a stranger."""
    store = ReportStore(folder)

    @app.post("/reports/<kind>")
    def add_report(kind: str) -> Response:
        require_client()
        if kind not in KINDS:
            raise NotFound(
                f"There are no reports of the kind {kind[:40]!r}.", cure=f"The kinds are {', '.join(KINDS)}."
            )
        document = decode_object(json_body(MAXIMUM_REPORT_BYTES, f"A report has {MAXIMUM_REPORT_BYTES} bytes at most."))
        return json_response(msgspec.to_builtins(store.add(kind, document)), 201)

    @app.get("/reports")
    def list_reports() -> Response:
        require_client()
        return json_response(msgspec.to_builtins(ReportList(tuple(store.newest_first()))))

    @app.get("/reports/<report_id>")
    def read_report(report_id: str) -> Response:
        require_client()
        return Response(store.read(report_id), mimetype="application/json")


class ReportStore:
    """Reports in one folder, which is made when the first one comes; files of other names in it are left alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def add(self, kind: str, document: dict[str, Any]) -> KeptReport:
        """Keep a report, and let the oldest go when there are too many.

        Raises InvalidRequest for a head that is not texts, NoodleError when it can not be written.
        """
        head = _checked_head(document)
        content = msgspec.json.encode(document)
        now = datetime.datetime.now(datetime.UTC)
        report_id = f"{now:%Y%m%d-%H%M%S-%f}-{kind}-{secrets.token_hex(3)}"
        with self._lock:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._let_the_oldest_go(room_for_bytes=len(content))
                beside = self._folder / f".{report_id}.new"
                beside.write_bytes(content)
                beside.replace(self._path(report_id))
            except OSError as error:
                raise NoodleError(
                    f"The report can not be kept in {self._folder}: {error.strerror or error}.",
                    cure="Free some disk space, or set NOODLE_REPORTS_DIR on the coordinator to another folder.",
                ) from error
        return _kept(report_id, len(content), head)

    def newest_first(self) -> list[KeptReport]:
        """All that are kept; one that can not be read is listed without its head."""
        kept = []
        for path in reversed(self._paths()):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # it went meanwhile
                continue
            kept.append(_kept(path.stem, len(content), _head_of(content)))
        return kept

    def read(self, report_id: str) -> bytes:
        """A report's JSON as it came; raises NotFound."""
        if ID_PATTERN.fullmatch(report_id):
            try:
                return self._path(report_id).read_bytes()
            except FileNotFoundError:
                pass  # said below, as for an id that can be none
        raise NotFound(f"There is no report {report_id[:80]!r}.", cure="GET /reports lists them.")

    def _path(self, report_id: str) -> Path:
        return self._folder / f"{report_id}.json"

    def _paths(self) -> list[Path]:
        """Oldest first, for an id begins with its time."""
        return sorted(path for path in self._folder.glob("*.json") if ID_PATTERN.fullmatch(path.stem))

    def _let_the_oldest_go(self, room_for_bytes: int) -> None:
        paths = self._paths()
        sizes = {path: path.stat().st_size for path in paths}
        total_bytes = sum(sizes.values()) + room_for_bytes
        while paths and (len(paths) >= MAXIMUM_REPORTS or total_bytes > MAXIMUM_REPORTS_BYTES):
            oldest = paths.pop(0)
            total_bytes -= sizes[oldest]
            oldest.unlink(missing_ok=True)


def _checked_head(document: dict[str, Any]) -> ReportHead:
    try:
        head = msgspec.convert(document, ReportHead)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The report's head is wrong: {error}.", cure="Its fields are texts.") from error
    for name in ReportHead.__struct_fields__:
        if len(getattr(head, name)) > MAXIMUM_HEAD_CHARACTERS:
            raise InvalidRequest(
                f"'{name}' has more than the {MAXIMUM_HEAD_CHARACTERS} characters of a report's head.", param=name
            )
    return head


def _head_of(content: bytes) -> ReportHead:
    try:
        return msgspec.json.decode(content, type=ReportHead)
    except msgspec.DecodeError:  # written by hand, or cut by a full disk
        return ReportHead(headline="(not readable)")


def _kept(report_id: str, byte_count: int, head: ReportHead) -> KeptReport:
    match = ID_PATTERN.fullmatch(report_id)
    kind = match[1] if match else ""
    return KeptReport(id=report_id, kind=kind, byte_count=byte_count, **msgspec.structs.asdict(head))
