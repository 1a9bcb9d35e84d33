"""Calls that schemathesis generates from the OpenAPI document: no 500, and no undocumented answer."""

import pytest

from tests.support.clients.schemathesis_run import run_schemathesis
from tests.support.processes.cluster import running_cluster, wait_until

pytestmark = pytest.mark.timeout(400)
EXAMPLES = 10  # of each operation; `python -m tests.measure schemathesis` makes 2,000 calls
SECONDS = 300.0


def test_made_up_calls_get_documented_answers_and_leave_nothing_behind(tiny_folder, tmp_path):
    # a short context: requests without a length generate to its end
    with running_cluster(tmp_path / "state", tiny_folder, 2, NOODLE_CONTEXT_LENGTH="32") as cluster:
        run = run_schemathesis(cluster, tmp_path, examples=EXAMPLES, phases="fuzzing", seed=1, seconds=SECONDS)
        assert not run.failures, run.failures
        assert run.calls >= 10 * EXAMPLES, run.output
        assert set(run.statuses) >= {200, 400}, run.statuses
        assert not [status for status in run.statuses if status >= 500], run.statuses
        wait_until(lambda: cluster.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")
