"""Runs schemathesis against a running cluster's OpenAPI document."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes.cluster import Cluster

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@dataclass(frozen=True)
class SchemathesisRun:
    """The number of calls, their statuses, and the checks that failed."""

    calls: int
    statuses: dict[int, int]
    failures: list[str]
    output: str


def run_schemathesis(
    cluster: Cluster, folder: Path, *, examples: int, phases: str, seed: int, seconds: float, at_once: int = 1
) -> SchemathesisRun:
    """Make at most `examples` calls of each operation in each phase, with the cluster's token."""
    report = folder / "calls.ndjson"
    command = [
        Path(sys.executable).parent / "schemathesis",
        *("run", f"{cluster.url}/openapi.json", "--phases", phases, "--seed", str(seed)),
        *("--checks", ",".join(CHECKS), "--max-examples", str(examples), "--continue-on-failure", "--no-shrink"),
        *("--suppress-health-check", "all", "--generation-database", "none", "--request-timeout", "60"),
        *("--workers", str(at_once)),
        *("--header", f"Authorization: Bearer {cluster.token}", "--report-ndjson-path", report, "--no-color"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    statuses: dict[int, int] = {}
    failures: list[str] = []
    for line in report.read_text(encoding="utf-8").splitlines():
        scenario = json.loads(line).get("ScenarioFinished")
        for node in (scenario or {}).get("recorder", {}).get("interactions", {}).values():
            status = (node.get("response") or {}).get("status_code", 0)
            statuses[status] = statuses.get(status, 0) + 1
    if done.returncode != 0:
        failures.append(done.stdout[done.stdout.find("FAILURES") :] + done.stderr)
    return SchemathesisRun(sum(statuses.values()), statuses, failures, done.stdout)
