"""2,000 calls that schemathesis generates from the OpenAPI document, against two stages of the real model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.measure.report import Section
from tests.support.clients.schemathesis_run import CHECKS, run_schemathesis
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import running_cluster, wait_until

CALLS = 2000
EXAMPLES = 60  # of each operation, in addition to boundary values
AT_ONCE = 4
CONTEXT_TOKENS = 48  # a request without a length generates to the end of the context
LONGEST_SECONDS = 3600.0
EMPTY_SECONDS = 30.0


def measure() -> Section:
    """Measure; fail if a check fails or fewer than CALLS calls were made."""
    section = Section("schemathesis", "Made-up calls")
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(
            Path(scratch) / "s", real_model_folder(), 2, NOODLE_CONTEXT_LENGTH=str(CONTEXT_TOKENS)
        ) as cluster,
    ):
        started = time.monotonic()
        run = run_schemathesis(
            cluster,
            Path(scratch),
            examples=EXAMPLES,
            phases="coverage,fuzzing",
            seed=1,
            seconds=LONGEST_SECONDS,
            at_once=AT_ONCE,
        )
        seconds = time.monotonic() - started
        assert not run.failures, run.failures
        assert run.calls >= CALLS, f"{run.calls} calls were made"
        wait_until(lambda: cluster.kv_bytes_held() == 0, EMPTY_SECONDS, "no KV rows are held")
    section.say(
        f"Two stages of the real model, every operation of `/openapi.json`, {AT_ONCE} calls at a time, right and wrong "
        f"ones: {run.calls} calls in {seconds:.0f} s. Checked: {', '.join(CHECKS)}. Broken: none."
    )
    section.table(["status", "answers"], [[status, count] for status, count in sorted(run.statuses.items())])
    return section
