"""Two stages with one id: the second stays out, reports why, and takes over once the first has gone."""

import subprocess
import sys

from tests.support.processes.cluster import free_ports, request, wait_until
from tests.support.processes.stage_rig import running_stages

START_SECONDS = 60.0


def test_a_second_stage_with_the_same_number_takes_no_part_until_the_first_has_gone(tiny_folder, tmp_path):
    with running_stages(tmp_path, tiny_folder, (3, 3)) as rig:
        (port,) = free_ports(1)
        own = {"NOODLE_STAGE_ID": "1", "NOODLE_STAGE_BIND": f"127.0.0.1:{port}", "NOODLE_MACHINE": "another"}
        with (tmp_path / "second.log").open("wb") as log:
            second = subprocess.Popen(
                [sys.executable, "-m", "services.stage"], env=rig.environment | own, stdout=log, stderr=log
            )
        try:

            def health():
                try:
                    return request(port, "GET", "/health", token=rig.token)
                except OSError:
                    return None, {}

            wait_until(lambda: health()[0] == 503, START_SECONDS, "the second one is refused")
            answer = health()[1]
            assert answer["status"] == "failed"
            assert f"The number 1 is taken by the stage at {rig.urls[1]}" in answer["detail"]
            assert "NOODLE_STAGE_ID" in answer["detail"]
            assert rig.work_queue.stage_states()[1].machine == "test"
            assert rig.work_queue.stage_states()[1].ready_version == 1
        finally:
            second.terminate()
            second.wait(30)
        assert rig.work_queue.stage_states()[1].machine == "test"  # its departure removed nothing of the other stage
