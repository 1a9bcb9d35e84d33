"""`noodle init`: what stands in .env and secrets/ afterwards, what a second run keeps, and what is refused by name."""

import base64
import json
import os
import stat
from pathlib import Path

import pytest

from noodle import __version__
from noodle.config.environment import read_variables
from noodle.errors import ConfigurationError
from services.cli.commands.init import prepare
from services.cli.main import main
from services.cli.project import join_line
from services.cli.project.join_line import Join
from services.cli.project.machine_settings import InitOptions, settings
from services.cli.project.project import read_values, with_values

ROOT = Path(__file__).parents[4]
A = InitOptions(machine="a", address="192.168.1.101", peer="192.168.1.102")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docker-compose.yml").touch()
    return tmp_path


def join_of_a():
    return Join(
        noodle_version=__version__,
        machine="machine-a",
        address="192.168.1.101",
        coordinator_port=8080,
        valkey_port=6379,
        peer_address="192.168.1.102",
        cluster_token="t" * 40,
        valkey_password="p" * 40,
    )


def env_of(folder):
    return read_values((folder / ".env").read_text(encoding="utf-8"))


def secrets_of(folder):
    return {path.name: path.read_text(encoding="utf-8").strip() for path in (folder / "secrets").iterdir()}


def join_text_of(printed):
    return printed.rsplit("--join ", 1)[1].split()[0]


def joined(folder, tmp_path_factory, capsys):
    """Machine A in one folder; the text that B is given."""
    prepare(folder, A, None)
    other = tmp_path_factory.mktemp("b")
    (other / "docker-compose.yml").touch()
    return other, join_text_of(capsys.readouterr().out)


def test_one_host_is_what_it_makes_without_options(folder, capsys):
    assert prepare(folder, InitOptions(), None) == 0
    values = env_of(folder)
    assert values["COMPOSE_PROFILES"] == "single"
    assert values["COMPOSE_FILE"] == "docker-compose.yml"
    assert (values["NOODLE_LAN_ADDRESS"], values["NOODLE_PEER_ADDRESS"]) == ("127.0.0.1", "")
    assert values["NOODLE_STAGE_1_PORT"] == "8082"
    assert values["NOODLE_MODEL"] == "SmolLM2-135M-Instruct"
    assert set(secrets_of(folder)) == {"api_key", "cluster_token", "grafana_password", "valkey.acl", "valkey_password"}
    printed = capsys.readouterr().out
    assert "docker compose up" in printed
    assert not [secret for name, secret in secrets_of(folder).items() if name != "valkey.acl" and secret in printed]


def test_what_it_writes_is_taken_by_the_services(folder):
    prepare(folder, A, None)
    read_variables({name: value for name, value in env_of(folder).items() if name.startswith("NOODLE_")})


def test_the_secrets_are_the_owners_alone_and_readable_for_the_users_of_containers(folder):
    prepare(folder, InitOptions(), None)
    assert stat.S_IMODE((folder / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / "secrets").iterdir()} == {0o644}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_writes_belongs_to_the_folders_owner(folder):
    os.chown(folder, 12345, 12346)
    prepare(folder, InitOptions(), None)
    made = [folder / ".env", folder / "secrets", folder / "models", *(folder / "secrets").iterdir()]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}


def test_a_second_run_keeps_secrets_and_the_lines_of_others(folder):
    prepare(folder, A, None)
    before = secrets_of(folder)
    with (folder / ".env").open("a", encoding="utf-8") as file:
        file.write("# mine\nNOODLE_SPLIT=10,20\nNOODLE_GRAFANA_PORT=3001\n")
    prepare(folder, InitOptions(gpu=True, name="laptop"), None)
    values = env_of(folder)
    assert secrets_of(folder) == before
    assert "# mine" in (folder / ".env").read_text(encoding="utf-8")
    assert values["NOODLE_SPLIT"] == "10,20"
    assert values["NOODLE_GRAFANA_PORT"] == "3001"
    assert values["NOODLE_MACHINE"] == "laptop"
    assert values["COMPOSE_FILE"] == "docker-compose.yml:docker-compose.lan.yml:docker-compose.gpu.yml"
    prepare(folder, InitOptions(), None)
    assert env_of(folder) == values
    prepare(folder, InitOptions(gpu=False), None)
    assert "gpu" not in env_of(folder)["COMPOSE_FILE"]


def test_a_secret_that_is_missing_or_empty_is_made_again_and_the_others_stay(folder):
    prepare(folder, InitOptions(), None)
    before = secrets_of(folder)
    (folder / "secrets" / "api_key").unlink()
    (folder / "secrets" / "valkey_password").write_text("")
    prepare(folder, InitOptions(), None)
    after = secrets_of(folder)
    assert {name for name in before if before[name] != after[name]} == {"api_key", "valkey_password", "valkey.acl"}


def test_a_secret_that_is_too_short_is_refused(folder):
    (folder / "secrets").mkdir()
    (folder / "secrets" / "cluster_token").write_text("short")
    with pytest.raises(ConfigurationError, match=r"secrets/cluster_token is shorter than 16"):
        prepare(folder, InitOptions(), None)
    assert not (folder / ".env").exists()


def test_machine_b_gets_what_it_needs_from_the_join_line_and_nothing_else(folder, tmp_path_factory, capsys):
    other, text = joined(folder, tmp_path_factory, capsys)
    prepare(other, InitOptions(machine="b"), text)
    values = env_of(other)
    assert values["COMPOSE_PROFILES"] == "b"
    assert (values["NOODLE_LAN_ADDRESS"], values["NOODLE_PEER_ADDRESS"]) == ("192.168.1.102", "192.168.1.101")
    assert values["NOODLE_COORDINATOR_URL"] == "http://192.168.1.101:8080"
    assert values["NOODLE_VALKEY_URL"] == "redis://noodle@192.168.1.101:6379"
    assert values["NOODLE_STAGE_1_PORT"] == "8081"
    assert values["NOODLE_MACHINE"] == "machine-b"
    own, of_a = secrets_of(other), secrets_of(folder)
    assert own == {name: of_a[name] for name in ("cluster_token", "valkey_password")}
    prepare(other, InitOptions(), None)  # again, without the line
    assert (env_of(other), secrets_of(other)) == (values, own)


def test_ports_that_a_has_moved_reach_b(folder, tmp_path_factory, capsys):
    prepare(folder, A, None)
    text = (folder / ".env").read_text(encoding="utf-8")
    (folder / ".env").write_text(with_values(text, {"NOODLE_COORDINATOR_PORT": "9000", "NOODLE_VALKEY_PORT": "9001"}))
    other, text = joined(folder, tmp_path_factory, capsys)
    prepare(other, InitOptions(machine="b"), text)
    assert env_of(other)["NOODLE_COORDINATOR_URL"] == "http://192.168.1.101:9000"
    assert env_of(other)["NOODLE_VALKEY_URL"] == "redis://noodle@192.168.1.101:9001"


def test_a_join_line_of_another_cluster_is_refused_while_the_old_secrets_are_there(folder, tmp_path_factory, capsys):
    other, text = joined(folder, tmp_path_factory, capsys)
    prepare(other, InitOptions(machine="b"), text)
    (folder / "secrets" / "cluster_token").unlink()
    prepare(folder, InitOptions(), None)
    with pytest.raises(ConfigurationError, match="another cluster") as refused:
        prepare(other, InitOptions(), join_text_of(capsys.readouterr().out))
    assert "delete secrets/" in refused.value.cure


def test_two_machines_of_one_name_are_refused(folder, tmp_path_factory, capsys):
    other, text = joined(folder, tmp_path_factory, capsys)
    with pytest.raises(ConfigurationError, match="Machine A is called machine-a too"):
        prepare(other, InitOptions(machine="b", name="machine-a"), text)


def test_machine_b_without_its_secrets_asks_for_the_join_line(folder, tmp_path_factory, capsys):
    other, text = joined(folder, tmp_path_factory, capsys)
    prepare(other, InitOptions(machine="b"), text)
    (other / "secrets" / "valkey_password").unlink()
    with pytest.raises(ConfigurationError, match="secrets/valkey_password is missing") as refused:
        prepare(other, InitOptions(), None)
    assert "--join" in refused.value.cure


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (InitOptions(machine="single", peer="192.168.1.102"), "--peer means nothing with --machine single"),
        (InitOptions(machine="single", address="192.168.1.101"), "--address means nothing"),
        (InitOptions(machine="single", stages=3), "--stages 3"),
        (InitOptions(machine="a"), "Machine a needs --address"),
        (InitOptions(machine="a", address="192.168.1.101"), "Machine a needs --peer"),
        (
            InitOptions(machine="a", address="localhost", peer="192.168.1.102"),
            "--address localhost is not an IPv4 address",
        ),
        (
            InitOptions(machine="a", address="127.0.0.1", peer="192.168.1.102"),
            "--address 127.0.0.1 cannot be reached from another",
        ),
        (
            InitOptions(machine="a", address="0.0.0.0", peer="192.168.1.102"),
            r"--address 0.0.0.0 cannot be reached from another",
        ),
        (InitOptions(machine="a", address="192.168.1.101", peer="192.168.1.101"), "have the same address"),
        (InitOptions(machine="b"), "Machine b needs --address"),
        (InitOptions(machine="b", address="192.168.1.102"), "Machine b needs --join"),
        (InitOptions(machine="b", gpu=True), "--gpu means nothing with --machine b"),
        (InitOptions(machine="b", stages=2), "--stages means nothing with --machine b"),
        (InitOptions(machine="b", model="gpt2"), "--model means nothing with --machine b"),
        (InitOptions(name="my laptop"), "--name 'my laptop'"),
        (InitOptions(model="/home/me/llama"), "--model /home/me/llama"),
        (InitOptions(model="../llama"), r"--model \.\./llama"),
        (InitOptions(model="C:\\llama"), "--model C:"),
        (InitOptions(model="models/../../llama"), "--model models/"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(options, said):
    with pytest.raises(ConfigurationError, match=said) as refused:
        settings(options, {}, 4)
    assert refused.value.cure


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"NOODLE_SPILT": "10,20"}, "NOODLE_SPILT is not a variable of noodle"),
        ({"NOODLE_STAGES": "two"}, "NOODLE_STAGES is 'two'"),
        ({"NOODLE_LAN_ADDRESS": "laptop"}, "NOODLE_LAN_ADDRESS is 'laptop'"),
        ({"COMPOSE_PROFILES": "c"}, "COMPOSE_PROFILES in .env is 'c'"),
        ({"NOODLE_COORDINATOR_PORT": "3000"}, "NOODLE_COORDINATOR_PORT and NOODLE_GRAFANA_PORT in .env are both 3000"),
        ({"NOODLE_STAGE_MEMORY": "8"}, "NOODLE_STAGE_MEMORY is '8'"),
    ],
)
def test_what_is_wrong_in_an_env_file_is_named(before, said):
    with pytest.raises(ConfigurationError, match=said) as refused:
        settings(InitOptions(), before, 4)
    assert refused.value.cure


def test_a_folder_does_not_become_another_machine(folder):
    prepare(folder, InitOptions(machine="single"), None)
    with pytest.raises(ConfigurationError, match="is machine 'single'"):
        prepare(folder, A, None)


def test_files_that_others_added_to_the_set_stay():
    before = {"COMPOSE_FILE": "docker-compose.yml:mine.yml"}
    assert settings(InitOptions(), before, 4)["COMPOSE_FILE"] == "docker-compose.yml:mine.yml"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("org/name@main", "org/name@main"),
        ("models/llama", "/models/llama"),
        ("./models/llama.gguf", "/models/llama.gguf"),
        ("models\\llama\\", "/models/llama"),
        ("/models/llama", "/models/llama"),
    ],
)
def test_a_model_is_named_as_the_container_sees_it(given, written):
    assert settings(InitOptions(model=given), {}, 4)["NOODLE_MODEL"] == written


@pytest.mark.parametrize("change", [lambda text: text[:-5], lambda text: "nonsense", lambda text: text[4:]])
def test_a_join_line_that_was_not_copied_whole_is_refused(change):
    text = join_line.encode(join_of_a())
    with pytest.raises(ConfigurationError, match=r"join line") as refused:
        join_line.decode(change(text))
    assert "machine A" in refused.value.cure


def test_a_join_line_that_was_wrapped_is_read():
    join = join_of_a()
    text = join_line.encode(join)
    assert join_line.decode(text[:30] + "\n  " + text[30:]) == join


def test_a_join_line_of_another_version_is_refused_with_both():
    text = base64.urlsafe_b64encode(json.dumps({"noodle_version": "9.0", "new": 1}).encode()).decode()
    with pytest.raises(ConfigurationError, match=f"noodle 9.0, and this is noodle {__version__}"):
        join_line.decode(text)


def test_the_env_file_is_read_as_compose_reads_it():
    text = "# A=1\nB='two words'\nexport C=3 # a remark\nD=4\nD=5\n\nE=\n"
    assert read_values(text) == {"B": "two words", "C": "3", "D": "5", "E": ""}
    assert with_values(text, {"D": "6", "F": "7"}).splitlines()[3:] == ["D=6", "", "E=", "F=7"]


def test_a_folder_without_the_compose_file_is_refused(tmp_path, capsys):
    assert main(["init", "--folder", str(tmp_path)]) == 1
    assert "docker-compose.yml" in capsys.readouterr().err
