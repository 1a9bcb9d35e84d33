"""From .env to firewall rules of both systems; nothing is set here (tests/engine/test_firewall.py does)."""

import pytest

from noodle.errors import ConfigurationError
from services.cli.project import firewall as firewall_rules
from services.cli.project.project import find_project


def project(tmp_path, text):
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    return find_project(tmp_path)


@pytest.fixture
def of_a(tmp_path):
    return project(
        tmp_path, "COMPOSE_PROFILES=a\nNOODLE_LAN_ADDRESS=192.168.1.101\nNOODLE_PEER_ADDRESS=192.168.1.102\n"
    )


def test_each_port_is_open_to_the_other_machine_alone_and_grafana_to_nobody(of_a):
    openings = firewall_rules.openings_of(of_a, [])
    assert {each.port: each.sources for each in openings} == {
        8080: ("192.168.1.102",),
        6379: ("192.168.1.102",),
        8081: ("192.168.1.102",),
        3000: (),
    }
    assert "this machine only" in firewall_rules.in_words(openings)[-1]


def test_people_may_come_to_the_coordinator_and_grafana_from_where_it_is_said(of_a):
    openings = {
        each.port: each.sources for each in firewall_rules.openings_of(of_a, ["192.168.1.64/26"], ["172.18.0.0/16"])
    }
    assert openings[8080] == ("192.168.1.102", "192.168.1.64/26", "172.18.0.0/16")
    assert openings[6379] == ("192.168.1.102", "172.18.0.0/16")
    assert openings[3000] == ("192.168.1.64/26", "172.18.0.0/16")


@pytest.mark.parametrize("clients", [["everybody"], ["0.0.0.0/0"], ["::1"]])
def test_clients_must_be_addresses_and_not_all_of_them(of_a, clients):
    with pytest.raises(ConfigurationError, match="--clients"):
        firewall_rules.openings_of(of_a, clients)


def test_a_machine_alone_and_one_without_a_peer_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"only on 127\.0\.0\.1"):
        firewall_rules.openings_of(project(tmp_path, "COMPOSE_PROFILES=single\n"), [])
    with pytest.raises(ConfigurationError, match="NOODLE_PEER_ADDRESS"):
        firewall_rules.openings_of(project(tmp_path, "COMPOSE_PROFILES=a\nNOODLE_LAN_ADDRESS=192.168.1.101\n"), [])


def test_linux_rules_match_the_port_before_docker_rewrote_it_and_nothing_else(of_a):
    script = firewall_rules.linux_script(firewall_rules.openings_of(of_a, []), "192.168.1.101")
    rules = [line for line in script.splitlines() if line.startswith("-A")]
    assert len(rules) == 7
    assert all("--ctorigdst 192.168.1.101 --ctorigdstport " in rule for rule in rules)
    matched = "-p tcp -m conntrack --ctorigdst 192.168.1.101 --ctorigdstport 8080 --ctdir ORIGINAL"
    assert rules[:2] == [f"-A NOODLE -s 192.168.1.102 {matched} -j RETURN", f"-A NOODLE {matched} -j DROP"]
    assert "INPUT" not in script
    assert "-P " not in script


def test_rules_without_an_address_of_the_machine_are_refused():
    with pytest.raises(ConfigurationError, match="NOODLE_LAN_ADDRESS"):
        firewall_rules.linux_script([], "127.0.0.1")


def test_the_unit_runs_after_docker_at_each_boot():
    unit = firewall_rules.systemd_unit("/usr/local/sbin/noodle-firewall")
    for line in ("After=docker.service", "WantedBy=docker.service", "ExecStart=/usr/local/sbin/noodle-firewall"):
        assert line in unit.splitlines()


def test_windows_rules_name_ports_and_addresses_and_narrow_docker_desktops_own(of_a):
    openings = firewall_rules.openings_of(of_a, ["192.168.1.7"])
    lines = firewall_rules.windows_script(openings).splitlines()
    new = [line for line in lines if line.startswith("New-NetFirewallRule")]
    assert len(new) == 4
    assert "-LocalPort 8080 -RemoteAddress '192.168.1.102','192.168.1.7' " in new[0]
    assert lines[-1].endswith("Set-NetFirewallRule -RemoteAddress '192.168.1.102','192.168.1.7'")
    assert "-RemoteAddress Any" in firewall_rules.windows_undo()
