"""A container's health check tells what loads from what is broken."""

import pytest

from noodle.web.probe import CONFIG_OF, main
from tests.support.network.http_stand_in import http_stand_in
from tests.support.processes.cluster import free_ports

TOKEN = "x" * 20


def probed(service, url, monkeypatch, capsys):
    """Exit code of the health check of a service that listens there, and what it prints."""
    monkeypatch.setenv("NOODLE_CLUSTER_TOKEN", TOKEN)
    monkeypatch.setenv(f"NOODLE_{service.upper()}_BIND", url.removeprefix("http://").replace("127.0.0.1", "0.0.0.0"))
    if service == "stage":
        monkeypatch.setenv("NOODLE_ADVERTISE_URL", "http://192.168.1.102:8081")
    if service == "coordinator":
        monkeypatch.setenv("NOODLE_API_KEY", "key")
    return main([service]), capsys.readouterr().out


@pytest.mark.parametrize("service", CONFIG_OF)
@pytest.mark.parametrize("status", ["starting", "waiting", "ready"])
def test_what_loads_or_waits_is_healthy_and_says_what_it_does(service, status, monkeypatch, capsys):
    with http_stand_in() as stand_in:
        stand_in.answer("/health", {"status": status, "detail": "layers 0 to 14"})
        assert probed(service, stand_in.url, monkeypatch, capsys) == (0, f"{status}: layers 0 to 14\n")
        assert stand_in.asked[0].authorization == f"Bearer {TOKEN}"


def test_what_has_failed_is_not_healthy_and_says_why(monkeypatch, capsys):
    with http_stand_in() as stand_in:
        stand_in.answer("/health", {"status": "failed", "detail": "the disk is full"}, status=503)
        assert probed("stage", stand_in.url, monkeypatch, capsys) == (1, "failed: the disk is full\n")


def test_what_does_not_answer_is_not_healthy(monkeypatch, capsys):
    code, said = probed("planner", f"http://127.0.0.1:{free_ports(1)[0]}", monkeypatch, capsys)
    assert code == 1
    assert "gives no answer" in said


def test_another_program_on_the_port_is_not_healthy(monkeypatch, capsys):
    with http_stand_in() as stand_in:
        stand_in.answer("/health", "<html>")
        assert probed("planner", stand_in.url, monkeypatch, capsys)[0] == 1


def test_a_wrong_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("NOODLE_STAGES", "two")
    assert main(["planner"]) == 1
    assert "NOODLE_STAGES is 'two'" in capsys.readouterr().out


def test_a_service_that_does_not_exist_is_refused(capsys):
    assert main(["valkey"]) == 1
    assert "coordinator|planner|stage" in capsys.readouterr().err
