"""What noodle init left in a project folder, read: the machine's part, its ports, its secrets."""

import pytest

from noodle.errors import ConfigurationError
from services.cli.project.project import find_project, require_project

OF_B = """\
# machine B
COMPOSE_PROFILES=b
COMPOSE_FILE=docker-compose.yml:docker-compose.lan.yml
COMPOSE_PATH_SEPARATOR=:
NOODLE_MACHINE=pc
NOODLE_LAN_ADDRESS=192.168.1.102
NOODLE_PEER_ADDRESS=192.168.1.101
NOODLE_COORDINATOR_URL=http://192.168.1.101:8080
NOODLE_VALKEY_URL="redis://noodle@192.168.1.101:6379"
"""


def project_of(folder, text):
    (folder / ".env").write_text(text, encoding="utf-8")
    return find_project(folder)


def ports(project):
    return {published.service: published.port for published in project.published()}


def test_machine_b_publishes_its_stage_alone(tmp_path):
    project = project_of(tmp_path, OF_B)
    assert (project.role, project.machine, project.lan_address) == ("b", "pc", "192.168.1.102")
    assert ports(project) == {"stage-1": 8081}
    assert project.coordinator_url == "http://192.168.1.101:8080"
    assert project.valkey_url == "redis://noodle@192.168.1.101:6379"
    assert project.compose_files == ["docker-compose.yml", "docker-compose.lan.yml"]


def test_machine_a_publishes_what_the_others_need(tmp_path):
    addresses = "NOODLE_LAN_ADDRESS=192.168.1.101\nNOODLE_PEER_ADDRESS=192.168.1.102\n"
    project = project_of(tmp_path, f"COMPOSE_PROFILES=a\n{addresses}NOODLE_COORDINATOR_PORT=9080\n")
    assert ports(project) == {"coordinator": 9080, "valkey": 6379, "stage-0": 8081, "grafana": 3000}
    assert project.coordinator_url == "http://192.168.1.101:9080"


def test_one_machine_alone_has_both_stages_on_loopback(tmp_path):
    project = project_of(tmp_path, "COMPOSE_PROFILES=single\n")
    assert project.lan_address == "127.0.0.1"
    assert ports(project)["stage-1"] == 8082


def test_a_folder_without_a_part_in_a_cluster_is_no_project(tmp_path):
    assert find_project(tmp_path) is None
    assert project_of(tmp_path, "NOODLE_STAGES=3\n") is None
    with pytest.raises(ConfigurationError, match="says what this machine is") as refused:
        require_project(tmp_path)
    assert "init" in refused.value.cure


@pytest.mark.parametrize(
    ("text", "says"),
    [("COMPOSE_PROFILES=c\n", "none of single, a, b"), ("COMPOSE_PROFILES=b\nNOODLE_STAGE_1_PORT=0\n", "not a port")],
)
def test_an_env_with_a_value_that_means_nothing_is_refused_by_name(tmp_path, text, says):
    with pytest.raises(ConfigurationError, match=says):
        project_of(tmp_path, text).published()


def test_a_secret_that_is_missing_or_empty_is_reported_with_its_path(tmp_path):
    project = project_of(tmp_path, OF_B)
    with pytest.raises(ConfigurationError, match="cluster_token") as refused:
        project.secret("cluster_token")
    assert "init" in refused.value.cure
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "cluster_token").write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is empty"):
        project.secret("cluster_token")
    (tmp_path / "secrets" / "cluster_token").write_text("secret\n", encoding="utf-8")
    assert project.secret("cluster_token") == "secret"
