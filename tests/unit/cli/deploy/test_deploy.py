"""The parts of noodle deploy that need no other machine: why ssh failed, what is copied, who is machine A."""

import io
import subprocess
import sys
import tarfile
import time

import pytest

from noodle.errors import ConfigurationError
from services.cli.commands.init import join_of
from services.cli.deploy import copy
from services.cli.deploy.command import by_hand_on_windows
from services.cli.deploy.machines import prepare_project
from services.cli.deploy.ssh import Remote, refusal, ssh_problem
from services.cli.project.join_line import decode, encode
from services.cli.project.programs import Ran, follow_program, run_program

REMOTE = Remote("192.168.1.102", "anna")


@pytest.mark.parametrize(
    ("said", "problem", "cure"),
    [
        (
            "anna@192.168.1.102: Permission denied (publickey,password).",
            "key_refused",
            "ssh-copy-id anna@192.168.1.102",
        ),
        ("ssh: connect to host 192.168.1.102 port 22: Connection timed out", "unreachable", "ping 192.168.1.102"),
        ("ssh: connect to host 192.168.1.102 port 22: No route to host", "unreachable", "ping 192.168.1.102"),
        ("ssh: connect to host 192.168.1.102 port 22: Connection refused", "refused", "openssh-server"),
        ("ssh: Could not resolve hostname pc: Name or service not known", "no_such_name", "IP address"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "host_changed",
            "ssh-keygen -R",
        ),
        ("No ED25519 host key is known for pc and you have requested strict checking.", "host_unknown", "answer yes"),
        ("Host key verification failed.", "host_unknown", "answer yes"),
        ("kex_exchange_identification: read: Connection reset by peer", "other", "ssh -v"),
    ],
)
def test_why_ssh_failed_is_recognised_with_its_cure(said, problem, cure):
    ran = Ran(255, "", said)
    assert ssh_problem(ran) == problem
    error = refusal(problem, REMOTE, ran.last_line, "linux")
    assert cure in error.cure


def test_a_program_that_fails_there_is_no_failure_of_ssh():
    assert ssh_problem(Ran(1, "", "Permission denied")) is None
    assert ssh_problem(Ran(is_missing=True)) == "no_ssh"
    assert ssh_problem(Ran(is_late=True)) == "unreachable"


def test_windows_has_its_own_way_to_bring_a_key():
    assert "authorized_keys" in refusal("key_refused", REMOTE, "", "windows").cure
    assert "OpenSSH.Client" in refusal("no_ssh", REMOTE, "", "windows").cure


def test_ssh_never_asks_and_never_waits_without_an_end():
    command = REMOTE.command("true")
    assert command[0] == "ssh"
    assert {"BatchMode=yes", "ConnectTimeout=8", "ServerAliveInterval=15"} <= set(command)
    assert command[-2:] == ["anna@192.168.1.102", "true"]


@pytest.fixture
def folder(tmp_path):
    for name in ("docker-compose.yml", "Dockerfile.cpu", "services/cli/a.py", "shared/noodle/b.py", "deploy/x.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for name in (".env", "secrets/cluster_token", "models/m/w", ".venv/x", "tests/t.py", "docs/d.md", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("this text is not for machine B", encoding="utf-8")
    return tmp_path


def test_secrets_env_and_models_are_never_copied(folder):
    names = copy.files_to_copy(folder)
    assert names == ["Dockerfile.cpu", "deploy/x.sh", "docker-compose.yml", "services/cli/a.py", "shared/noodle/b.py"]
    content = copy.tar_of(folder, names)
    assert content == copy.tar_of(folder, names)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == names
        assert archive.getmember("deploy/x.sh").mode == 0o755
    assert copy.top_folders(names) == ["deploy", "services", "shared"]


def test_with_git_only_tracked_files_are_copied_and_secrets_not_even_then(folder):
    for arguments in (
        ["init", "-q"],
        ["add", "-f", "docker-compose.yml", "Dockerfile.cpu", "services", "shared", ".env", "secrets"],
    ):
        (folder / ".git" / "config").unlink(missing_ok=True)
        subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)
    assert copy.files_to_copy(folder) == [
        "Dockerfile.cpu",
        "docker-compose.yml",
        "services/cli/a.py",
        "shared/noodle/b.py",
    ]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="not noodle's folder"):
        copy.files_to_copy(tmp_path)


def test_this_folder_becomes_machine_a_and_stays_it(folder, capsys):
    project = prepare_project(folder, "192.168.1.101", "192.168.1.102", "linux")
    assert (project.role, project.lan_address, project.peer_address) == ("a", "192.168.1.101", "192.168.1.102")
    token = project.secret("cluster_token")
    capsys.readouterr()
    again = prepare_project(folder, None, "192.168.1.102", "linux")
    assert capsys.readouterr().out == ""
    assert again.secret("cluster_token") == token
    moved = prepare_project(folder, None, "192.168.1.103", "linux")
    assert (moved.peer_address, moved.secret("cluster_token")) == ("192.168.1.103", token)
    join = join_of(moved)
    assert (join.address, join.peer_address, join.cluster_token) == ("192.168.1.101", "192.168.1.103", token)
    assert decode(encode(join)) == join


def test_a_folder_that_is_machine_b_is_not_made_machine_a(folder):
    (folder / ".env").write_text("COMPOSE_PROFILES=b\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is machine 'b'"):
        prepare_project(folder, "192.168.1.101", "192.168.1.102", "linux")


def test_this_machines_address_is_the_one_towards_the_other(folder):
    assert prepare_project(folder, None, "192.168.1.102", "linux").lan_address != "127.0.0.1"


def test_a_windows_machine_b_gets_the_commands_to_run():
    text = by_hand_on_windows("JOIN", "192.168.1.102", "192.168.1.101")
    for line in (
        "init --machine b --address 192.168.1.102 --join JOIN",
        "docker compose up --detach --build",
        "firewall.ps1 -Apply",
    ):
        assert line in text


def test_a_followed_program_is_logged_line_by_line_and_ended_when_late():
    lines = []
    program = "import sys; print('one'); print(sys.stdin.read()); sys.exit(3)"
    ran = follow_program([sys.executable, "-c", program], 30, lines.append, sent=b"two")
    assert (ran.code, lines, ran.last_line) == (3, ["one", "two"], "two")
    began = time.monotonic()
    late = follow_program([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, lines.append)
    assert late.is_late
    assert not late.is_good
    assert time.monotonic() - began < 30
    assert follow_program(["no-such-program-here"], 1, lines.append).is_missing


def test_a_program_is_run_for_its_output_and_not_longer_than_it_may():
    assert run_program([sys.executable, "-c", "print('x')"], 30).output.strip() == "x"
    assert run_program([sys.executable, "-c", "import time; time.sleep(60)"], 0.2).is_late
    assert run_program(["no-such-program-here"], 1).is_missing
