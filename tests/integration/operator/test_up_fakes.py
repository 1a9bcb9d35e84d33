"""`noodle up` over stand-in services: what it starts, how it stops, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes.up_runs import UpRuns, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[UpRuns]:
    up_runs = UpRuns(tmp_path)
    yield up_runs
    up_runs.close()


def test_up_starts_everything_and_ctrl_c_leaves_nothing_behind(runs: UpRuns) -> None:
    process = runs.start_until_ready("--stages", "3")
    assert [service["name"] for service in runs.record()["services"]] == [
        "valkey",
        "planner",
        "stage-0",
        "stage-1",
        "stage-2",
        "coordinator",
    ]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert runs.nothing_is_left()
    stops = runs.lines("stops")
    assert stops[0] == "coordinator"
    assert sorted(stops[1:4]) == ["stage-0", "stage-1", "stage-2"]
    assert stops[4] == "planner"


def test_every_service_gets_its_part_by_its_environment(runs: UpRuns) -> None:
    runs.environment |= {"NOODLE_TRANSPORT": "queue"}
    runs.start_until_ready("--split", "10,2")
    stage = json.loads((runs.orders / "stage-1.environment").read_text())
    planner = json.loads((runs.orders / "planner.environment").read_text())
    assert stage["NOODLE_STAGE_ID"] == "1"
    assert stage["NOODLE_ADVERTISE_URL"] == f"http://127.0.0.1:{runs.first_port + 4}"
    assert stage["NOODLE_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert stage["NOODLE_MODEL"] == "/models/fake"
    coordinator = json.loads((runs.orders / "coordinator.environment").read_text())
    assert stage["NOODLE_TRANSPORT"] == coordinator["NOODLE_TRANSPORT"] == "queue"
    assert (planner["NOODLE_STAGES"], planner["NOODLE_SPLIT"]) == ("2", "10,2")


def test_secrets_are_in_no_command_line_no_log_and_no_environment(runs: UpRuns) -> None:
    runs.start_until_ready()
    secrets = [(runs.run_dir / name).read_text() for name in ("cluster_token", "valkey_password")]
    assert all(len(secret) >= 32 for secret in secrets)
    places = [runs.output(), *(path.read_text() for path in (runs.run_dir / "logs").iterdir())]
    places += [(runs.run_dir / "run.json").read_text()]
    for process_id in runs.living():
        for file_name in ("cmdline", "environ"):
            places.append((Path("/proc") / str(process_id) / file_name).read_bytes().decode())
    assert not [place for place in places for secret in secrets if secret in place]
    for path in (runs.run_dir / name for name in ("cluster_token", "valkey_password", "valkey.conf", "run.json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_service_that_died_is_started_again_and_its_last_words_are_shown(runs: UpRuns) -> None:
    runs.start_until_ready()
    os.kill(runs.service("stage-1")["process"]["pid"], signal.SIGKILL)
    wait_for(lambda: "Everything is ready again." in runs.output(), "the stage to come back")
    assert "stage-1 was ended by SIGKILL; restarting it in 0.2 s" in runs.output()
    assert "    stage-1 serves" in runs.output()
    assert len(runs.starts("stage-1")) == 2
    assert runs.service("stage-1")["restarts"] == 1


def test_a_service_that_goes_on_dying_is_given_more_and_more_time(runs: UpRuns) -> None:
    runs.start_until_ready()
    runs.order("stage-0.exit", "3\nnoodle stage: the disk is full")
    os.kill(runs.service("stage-0")["process"]["pid"], signal.SIGTERM)
    wait_for(lambda: "in 1.6 s" in runs.output(), "the fourth death")
    delays = [line.split(" in ")[1].split(" s")[0] for line in runs.output().splitlines() if "restarting it" in line]
    assert delays[:4] == ["0.2", "0.4", "0.8", "1.6"]
    (runs.orders / "stage-0.exit").unlink()
    wait_for(lambda: "Everything is ready again." in runs.output(), "the stage to come back")


def test_workers_of_a_dead_master_are_ended_before_the_next_one_starts(runs: UpRuns) -> None:
    runs.order("coordinator.worker")
    runs.start_until_ready()
    first_worker = int(wait_for(lambda: runs.lines("workers"), "the worker")[0])
    os.kill(runs.service("coordinator")["process"]["pid"], signal.SIGKILL)
    wait_for(lambda: len(runs.lines("workers")) == 2, "the second worker")
    assert not Path(f"/proc/{first_worker}").exists() or first_worker not in runs.living()


def test_nothing_outlives_a_killed_up_and_the_next_one_clears_what_it_left(runs: UpRuns) -> None:
    runs.order("stage-0.worker")  # ignores SIGTERM, as a computing worker may
    process = runs.start_until_ready()
    worker = int(wait_for(lambda: runs.lines("workers"), "the worker")[0])
    process.kill()
    process.wait(30)
    wait_for(lambda: runs.living() == [worker], "the children to follow it")
    assert runs.run_dir.exists()
    assert "noodle is not running" in runs.noodle("status").stdout
    (runs.orders / "stage-0.worker").unlink()

    second = runs.start("--stages", "1")
    wait_for(lambda: runs.output().count("noodle is ready") == 2, "the second up")
    assert "was killed; ended 1 process that it left." in runs.output()
    assert worker not in runs.living()
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    assert runs.nothing_is_left()


def test_a_stranger_with_the_number_of_an_old_child_is_left_alone(runs: UpRuns) -> None:
    process = runs.start_until_ready()
    process.kill()
    process.wait(30)
    wait_for(lambda: not runs.living(), "the children to follow it")
    record = runs.record()
    for service in record["services"]:
        service["process"]["pid"] = os.getpid()
    (runs.run_dir / "run.json").write_text(json.dumps(record))
    down = runs.noodle("down")
    assert down.returncode == 0
    assert "cleaned up after one that was killed" in down.stdout
    assert not runs.run_dir.exists()


def test_a_second_up_finds_the_first(runs: UpRuns) -> None:
    process = runs.start_until_ready()
    second = runs.noodle("up")
    assert second.returncode == 0
    assert f"noodle is already running (pid {process.pid}, running)" in second.stdout
    assert f"http://127.0.0.1:{runs.coordinator_port}" in second.stdout
    assert runs.noodle("up", "--detach").returncode == 0
    assert process.poll() is None


def test_detach_returns_when_ready_and_down_ends_it(runs: UpRuns) -> None:
    up = runs.noodle("up", "--detach")
    assert up.returncode == 0, up.stderr
    assert "noodle is ready: fake-model on 2 stages." in up.stdout
    status = json.loads(runs.noodle("status", "--json").stdout)
    assert [service["state"] for service in status["services"]] == ["running", *["ready"] * 4]
    down = runs.noodle("down")
    assert (down.returncode, "noodle has stopped." in down.stdout) == (0, True)
    assert runs.nothing_is_left()
    assert runs.noodle("down").stdout == "noodle is not running.\n"


def test_ctrl_c_before_a_background_start_is_ready_takes_it_back(runs: UpRuns) -> None:
    runs.order("coordinator.health", json.dumps({"status": "starting", "detail": "waiting for stage 0"}))
    process = runs.start("--detach")
    wait_for(lambda: runs.starts("coordinator"), "the coordinator")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert runs.nothing_is_left()


def test_a_start_that_fails_in_the_background_says_why(runs: UpRuns) -> None:
    runs.order("coordinator.health", json.dumps({"status": "starting"}))
    runs.order("stage-1.exit", "3\nnoodle stage: Layer 3 does not fit. Take a smaller model.")
    up = runs.noodle("up", "--detach")
    assert up.returncode == 1
    assert up.stderr == "noodle: stage-1: Layer 3 does not fit. Take a smaller model.\n"
    assert runs.nothing_is_left()


def test_a_service_that_refuses_its_configuration_ends_up_with_its_words(runs: UpRuns) -> None:
    runs.order("coordinator.health", json.dumps({"status": "starting"}))
    runs.order(
        "planner.exit", "3\nnoodle planner: NOODLE_SPLIT does not add up.\n[ERROR] Reason: Worker failed to boot."
    )
    up = runs.noodle("up")
    assert up.returncode == 1
    assert up.stderr == "noodle: planner: NOODLE_SPLIT does not add up.\n"
    assert runs.nothing_is_left()


def test_a_service_that_fails_while_loading_ends_up_with_its_words(runs: UpRuns) -> None:
    failed = {"status": "failed", "detail": "model.safetensors is cut short."}
    runs.order("stage-0.health", json.dumps(failed))
    runs.order("coordinator.health", json.dumps({"status": "starting"}))
    up = runs.noodle("up")
    assert up.returncode == 1
    assert up.stderr == "noodle: stage-0: model.safetensors is cut short.\n"
    assert runs.nothing_is_left()


def test_a_service_that_never_starts_is_not_tried_for_ever(runs: UpRuns) -> None:
    runs.order("coordinator.exit", "1\nsomething broke")
    up = runs.noodle("up")
    assert up.returncode == 1
    assert "coordinator ended with exit code 1 before everything was ready" in up.stderr
    assert "something broke" in up.stderr
    assert len(runs.starts("coordinator")) == 4


def test_progress_of_the_start_is_shown_as_lines_without_a_terminal(runs: UpRuns) -> None:
    loading = {"status": "starting", "detail": "loading layers 0 to 14", "progress": 0.4}
    runs.order("coordinator.health", json.dumps({"status": "starting", "detail": "waiting for stage 0"}))
    runs.order("stage-0.health", json.dumps(loading))
    runs.start()
    wait_for(lambda: "stage-0: loading layers 0 to 14 (40%)" in runs.output(), "a line of progress")
    assert "fake-model" not in runs.output()
    (runs.orders / "coordinator.health").unlink()
    wait_for(lambda: "noodle is ready: fake-model" in runs.output(), "the end of the start")


def test_a_model_that_cannot_be_had_is_said_with_its_cure(runs: UpRuns) -> None:
    runs.order("model.lines", json.dumps({"error": {"message": "There is no folder 'x'.", "cure": "Name one."}}) + "\n")
    up = runs.noodle("up", "--model", "x")
    assert up.returncode == 1
    assert up.stderr == "noodle: There is no folder 'x'.\n  Name one.\n"
    assert runs.nothing_is_left()


def test_ctrl_c_while_the_model_is_prepared_leaves_nothing_behind(runs: UpRuns) -> None:
    runs.order("model.wait")
    process = runs.start()
    wait_for(lambda: runs.starts("model"), "the model store")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert runs.nothing_is_left()


def test_a_service_that_ignores_sigterm_is_killed_by_a_second_ctrl_c(runs: UpRuns) -> None:
    runs.order("stage-0.stubborn")
    process = runs.start_until_ready()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stage-1" in runs.lines("stops"), "the stop to reach the stages")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert "stage-0 did not stop in time and was killed." in runs.output()
    assert runs.nothing_is_left()


def test_a_port_in_use_is_refused_with_its_purpose_and_its_variable(runs: UpRuns) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", runs.first_port + 4))
        other.listen()
        up = runs.noodle("up")
    assert up.returncode == 1
    assert f"Port {runs.first_port + 4} for stage 1 is taken" in up.stderr
    assert "NOODLE_FIRST_STAGE_PORT" in up.stderr
    assert not runs.starts("model")
    assert not runs.state_dir.exists()


@pytest.fixture
def small_disk(runs: UpRuns) -> Iterator[Path]:
    """The state folder on its own disk of 256 kB."""
    runs.state_dir.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", runs.state_dir], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    yield runs.state_dir
    runs.close()
    subprocess.run(["umount", "--lazy", runs.state_dir], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk completely."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free:
            file.write(b"x" * 4096)
    return filler


def test_a_full_state_disk_and_a_death_are_said_and_end_nothing(runs: UpRuns, small_disk: Path) -> None:
    runs.start_until_ready()
    wait_for(lambda: runs.starts("stage-1"), "the stage")
    filler = fill(small_disk)
    for deaths in (1, 2):
        os.kill(runs.starts("stage-1")[-1], signal.SIGKILL)
        wait_for(lambda: len(runs.starts("stage-1")) == deaths + 1, "the stage to come back")  # noqa: B023
    wait_for(lambda: runs.output().count("stage-1 was restarted.") == 2, "that to be said")
    assert runs.output().count("run.json cannot be written (No space left on device)") == 1
    assert "Free some space on that disk" in runs.output()
    assert runs.service("stage-1")["restarts"] == 0  # the last complete version
    assert (runs.run_dir / "logs" / "stage-1.log").exists()
    filler.unlink()
    wait_for(lambda: runs.service("stage-1")["restarts"] == 2, "the record to be written after all")
    assert "The record of this run can be written again." in runs.output()
    assert runs.noodle("down").returncode == 0
    assert not runs.run_dir.exists()


def test_a_background_run_whose_log_is_on_the_full_disk_goes_on_too(runs: UpRuns, small_disk: Path) -> None:
    assert runs.noodle("up", "--detach").returncode == 0
    wait_for(lambda: runs.starts("stage-1"), "the stage")
    fill(small_disk)
    os.kill(runs.starts("stage-1")[-1], signal.SIGKILL)
    wait_for(lambda: len(runs.starts("stage-1")) == 2, "the stage to come back")
    down = runs.noodle("down")
    assert down.returncode == 0, down.stderr
    assert not runs.run_dir.exists()


def test_a_state_disk_that_is_full_from_the_start_is_refused_with_path_reason_and_cure(
    runs: UpRuns, small_disk: Path
) -> None:
    fill(small_disk)
    up = runs.noodle("up")
    assert up.returncode == 1
    assert f"noodle: {runs.run_dir}" in up.stderr or "noodle: The state folder" in up.stderr
    assert "No space left on device" in up.stderr
    assert "NOODLE_STATE_DIR" in up.stderr
    assert "Traceback" not in up.stderr


def test_a_state_folder_that_is_a_file_is_refused_with_its_cure(runs: UpRuns) -> None:
    runs.state_dir.write_text("not a folder")
    for command in ("up", "status", "down"):
        said = runs.noodle(command)
        assert "Traceback" not in said.stderr
    assert "NOODLE_STATE_DIR" in runs.noodle("up").stderr
