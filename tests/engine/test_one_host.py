"""A complete noodle in containers on one host, started by the README's commands, and restarts of each part."""

import json
import subprocess
import sys
import time

import pytest

from tests.engine.engine import docker
from tests.engine.project import WITHOUT_GRAFANA, Project
from tests.support.processes.cluster import request, wait_until
from tests.support.sampling import sampled

pytestmark = pytest.mark.timeout(900)

OF_NOODLE = ("valkey", "planner", "coordinator", "stage-0", "stage-1")


def noodle(project, *arguments, seconds=600):
    """Run a noodle command of this host through the published port with the API key."""
    target = ("--url", f"http://127.0.0.1:{project.port}", "--key", project.api_key)
    command = [sys.executable, "-m", "services.cli", *arguments, *target]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def test_a_fresh_clone_is_made_ready_by_the_first_command_alone(images, tmp_path):
    project = Project(tmp_path)
    project.env_path.unlink()
    project.environment |= {
        "COMPOSE_PROJECT_NAME": project.name,
        "COMPOSE_FILE": "docker-compose.yml:" + "docker-compose.test.yml",
    }
    assert "no service selected" in project.tried("up").stderr
    printed = project.init()
    try:
        assert "a whole cluster on one host" in printed
        owner = tmp_path.stat()
        for path in (project.env_path, tmp_path / "secrets", tmp_path / "secrets" / "api_key"):
            assert (path.stat().st_uid, path.stat().st_gid) == (owner.st_uid, owner.st_gid)
        before = (project.env_path.read_bytes(), project.api_key)
        project.init()
        assert (project.env_path.read_bytes(), project.api_key) == before
        refused = project.tried("run", "--rm", "init", "--machine", "a")
        assert refused.returncode == 1
        assert "This folder is machine 'single'" in refused.stderr
    finally:
        project.down()
    assert project.left_behind() == []


def test_the_tokens_are_those_of_the_unsplit_model(project, model_folder):
    done = noodle(project, "verify", "--prompts", "12", "--new-tokens", "24")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_machine_with_nothing_but_docker_verifies_too(project):
    done = project.tried("exec", "-T", "stage-0", "noodle", "verify", "--prompts", "2", "--new-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The split changes nothing beyond rounding." in done.stdout


def test_every_part_is_healthy_by_its_own_check(project):
    def healthy():
        states = {name: project.inspect(name)["State"] for name in OF_NOODLE}
        return all(state["Health"]["Status"] == "healthy" for state in states.values())

    wait_until(healthy, 60, "all are healthy")
    last = project.inspect("stage-0")["State"]["Health"]["Log"][-1]["Output"]
    assert last.startswith("ready: layers ")


@pytest.mark.parametrize("service", WITHOUT_GRAFANA["single"])
def test_every_container_is_locked_down(project, service):
    seen = project.inspect(service)
    host = seen["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert docker("exec", seen["Id"], "id", "-u").strip() not in ("", "0")
    for bindings in (seen["NetworkSettings"]["Ports"] or {}).values():
        assert {binding["HostIp"] for binding in bindings or []} <= {"127.0.0.1"}


def test_an_anonymous_client_on_the_published_ports_gets_health_and_nothing_else(project):
    for port in (project.port, project.ports["STAGE_0"], project.ports["STAGE_1"]):
        status, answer = request(port, "GET", "/health")
        assert (status, set(answer)) == (200, {"service", "status"})
        for path in ("/metrics", "/plan", "/weights", "/v1/models", "/info"):
            assert request(port, "GET", path)[0] in (401, 404), path
            assert request(port, "GET", path, token="a guess of sixteen")[0] in (401, 404), path


@sampled("service", OF_NOODLE, ("valkey", "coordinator", "stage-1"))
def test_a_part_that_is_restarted_while_idle_costs_a_moment(project, service):
    expected = project.generate("The sky is blue because", 12)
    began = time.monotonic()
    project.compose("restart", service)
    wait_until(lambda: _answers_as(project, expected), 240, f"the same tokens again after {service}")
    print(f"{service} restarted: the same tokens after {time.monotonic() - began:.1f} s")


def _answers_as(project, expected):
    try:
        return project.generate("The sky is blue because", 12) == expected
    except (OSError, AssertionError):
        return False


def test_a_wrong_value_in_env_is_named_with_what_it_means(project):
    text = project.env_path.read_text(encoding="utf-8")
    try:
        for line, said in (
            ("NOODLE_STAGES=two", "NOODLE_STAGES is 'two'"),
            ("NOODLE_SPILT=10,20", "NOODLE_SPILT is not a variable of noodle. Did you mean NOODLE_SPLIT?"),
        ):
            project.env_path.write_text(text + line + "\n", encoding="utf-8")
            done = project.tried("run", "--rm", "--no-deps", "planner")
            assert done.returncode == 3
            assert said in done.stderr
    finally:
        project.env_path.write_text(text, encoding="utf-8")


def test_a_missing_secret_is_named_and_init_makes_it_again(project):
    path = project.folder / "secrets" / "grafana_password"
    path.unlink()
    project.init()
    assert path.is_file()
    key = project.folder / "secrets" / "api_key"
    kept = key.read_bytes()
    key.unlink()
    try:
        done = project.tried("up", "--detach", "--no-build", "--no-deps", "--force-recreate", "coordinator")
        assert done.returncode != 0
        assert "secrets/api_key" in done.stderr
        print(done.stderr)
    finally:
        key.write_bytes(kept)
        project.up()
        project.wait_ready()


def test_a_model_that_is_not_there_is_named_with_the_forms_it_may_have(project):
    text = project.env_path.read_text(encoding="utf-8")
    project.env_path.write_text(text + "NOODLE_MODEL=/models/none\n", encoding="utf-8")
    try:
        done = project.tried("run", "--rm", "--no-deps", "coordinator", seconds=120)
        assert done.returncode == 3
        assert "There is no folder or file '/models/none'" in done.stderr
    finally:
        project.env_path.write_text(text, encoding="utf-8")


def test_prometheus_reads_its_configuration(project):
    container = project.container("prometheus")
    docker("exec", container, "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    assert json.loads(docker("inspect", container))[0]["State"]["Running"]
