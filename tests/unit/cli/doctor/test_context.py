"""What a machine is and whom it must reach, from what is in a folder; and that the doctor itself ends in time."""

import threading
import time

import pytest

from noodle.config.environment import command_config
from services.cli.doctor.command import examine
from services.cli.doctor.context import find_context, ports_to_try
from services.cli.project.programs import Ran

TOKEN = "a-token-of-some-length"
OF_A = """\
COMPOSE_PROFILES=a
COMPOSE_FILE=docker-compose.yml:docker-compose.lan.yml
NOODLE_MACHINE=laptop
NOODLE_LAN_ADDRESS=192.168.1.101
NOODLE_PEER_ADDRESS=192.168.1.102
"""
OF_B = """\
COMPOSE_PROFILES=b
NOODLE_MACHINE=pc
NOODLE_LAN_ADDRESS=192.168.1.102
NOODLE_PEER_ADDRESS=192.168.1.101
NOODLE_COORDINATOR_URL=http://192.168.1.101:8080
NOODLE_VALKEY_URL=redis://noodle@192.168.1.101:6379
"""


@pytest.fixture
def context_of(tmp_path):
    def find(env=None, *, secrets=True, compose=True, **environment):
        if compose:
            (tmp_path / "docker-compose.yml").touch()
        if env is not None:
            (tmp_path / ".env").write_text(env, encoding="utf-8")
        if secrets:
            (tmp_path / "secrets").mkdir(exist_ok=True)
            for name in ("cluster_token", "valkey_password"):
                (tmp_path / "secrets" / name).write_text(TOKEN, encoding="utf-8")
        config = command_config({"NOODLE_STATE_DIR": str(tmp_path / "state"), **environment})
        return find_context(config, environment, tmp_path, "linux")

    return find


def test_machine_a_must_reach_its_own_and_bs_stage(context_of):
    context = context_of(OF_A)
    assert {target.name: target.url for target in context.targets} == {
        "coordinator": "http://192.168.1.101:8080",
        "valkey": "redis://noodle@192.168.1.101:6379",
        "stage 0": "http://192.168.1.101:8081",
        "stage 1": "http://192.168.1.102:8081",
    }
    assert context.own_names == {"coordinator", "valkey", "stage 0"}
    assert context.needs_docker
    assert context.token == TOKEN
    tried = {(port.address, port.number) for port in ports_to_try(context)}
    assert ("127.0.0.1", 8080) in tried
    assert ("192.168.1.101", 3000) in tried


def test_machine_b_must_reach_a(context_of):
    context = context_of(OF_B)
    assert [target.url for target in context.targets] == [
        "http://192.168.1.101:8080",
        "redis://noodle@192.168.1.101:6379",
        "http://192.168.1.101:8081",
        "http://192.168.1.102:8081",
    ]
    assert context.own_names == {"stage 1"}
    assert {port.number for port in ports_to_try(context)} == {8081}


def test_an_env_with_an_unknown_or_wrong_value_is_a_finding_by_name(context_of):
    for line in ("NOODLE_STAGE=2\n", "NOODLE_STAGES=none\n"):
        (finding,) = [each for each in context_of(OF_A + line).results if each.status == "error"]
        assert line.partition("=")[0] in finding.what
        assert finding.cure


def test_secrets_that_are_missing_are_findings(context_of):
    findings = [each for each in context_of(OF_B, secrets=False).results if each.status == "error"]
    assert [each.check for each in findings] == ["secrets", "secrets"]
    assert all("init" in each.cure for each in findings)


def test_a_folder_in_which_nothing_was_done_has_init_as_its_cure(context_of):
    context = context_of()
    assert context.role == "not set up"
    assert context.needs_docker
    assert "run --rm init" in context.results[0].cure


def test_a_machine_by_hand_is_what_its_variables_say(context_of):
    url = "http://192.168.1.101:8080"
    context = context_of(NOODLE_COORDINATOR_URL=url, NOODLE_ADVERTISE_URL="http://localhost:8081", NOODLE_STAGE_ID="3")
    assert context.role == "by hand"
    assert not context.is_alone
    assert [target.name for target in context.targets] == ["coordinator", "valkey", "stage 3"]
    assert context.advertised[0][1] == "http://localhost:8081"
    assert ports_to_try(context) == []


def test_programs_that_do_not_answer_are_skipped_and_the_doctor_ends_in_time(context_of, tmp_path):
    never = threading.Event()

    def hangs(_arguments, _seconds):
        never.wait()
        return Ran()

    began = time.monotonic()
    try:
        results = examine(context_of(), hangs, tmp_path, began + 0.5)
    finally:
        never.set()
    assert time.monotonic() - began < 10
    late = {result.check for result in results if "took too long" in result.what}
    assert {"docker", "gpu"} <= late
    assert "memory" in {result.check for result in results} - late  # which needs no program
