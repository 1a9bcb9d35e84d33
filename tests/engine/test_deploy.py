"""What noodle deploy does on machine B, with a real OpenSSH server in a container.

docker there is a stand-in that records its calls; test_deploy_both.py starts real containers.
"""

import contextlib
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from noodle.errors import ConfigurationError, StartError
from services.cli.deploy import copy
from services.cli.deploy.machines import MARKER, MachineB
from services.cli.deploy.ssh import Remote, system_of
from services.cli.project.join_line import Join, decode
from tests.engine.engine import IMAGES, ROOT, docker, run
from tests.support.processes.cluster import free_ports, wait_until

pytestmark = pytest.mark.timeout(600)
IMAGE = "noodle-test-ssh"
HOST = "machine-b.test"
JOIN = Join(
    noodle_version="0.2.0",
    machine="laptop",
    address="192.168.1.101",
    coordinator_port=8080,
    valkey_port=6379,
    peer_address="192.168.1.102",
    cluster_token="t" * 32,
    valkey_password="p" * 32,
)


class SshServer:
    """The container and an ssh configuration for it."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.port = int(docker("port", name, "22").rsplit(":", 1)[1])
        self.key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        for user in ("anna", "win"):
            self.write(f"/home/{user}/.ssh/authorized_keys", self.key.with_suffix(".pub").read_text(), user)
        self.host_key = self.read("/etc/ssh/ssh_host_ed25519_key.pub").split()[1]

    def config(self, *, port=None, key=None, host_key=None):
        """Write an ssh configuration for HOST, correct unless changed."""
        path = self.folder / f"config-{secrets.token_hex(4)}"
        known = path.with_suffix(".known")
        where = port or self.port
        shown = self.host_key if host_key is None else host_key
        known.write_text(f"[127.0.0.1]:{where} ssh-ed25519 {shown}\n" if shown else "")
        path.write_text(
            f"Host {HOST}\n HostName 127.0.0.1\n Port {where}\n IdentityFile {key or self.key}\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {known}\n GlobalKnownHostsFile /dev/null\n HostKeyAlgorithms ssh-ed25519\n"
        )
        return path

    def remote(self, user="anna", **options):
        return Remote(HOST, user, self.config(**options))

    def run(self, *command, user="root"):
        done = run(["docker", "exec", "--user", user, self.name, *command])
        return done.stdout

    def read(self, path):
        return self.run("cat", path)

    def write(self, path, text, user):
        subprocess.run(
            ["docker", "exec", "-i", "--user", user, self.name, "sh", "-c", f"cat >{path}; chmod 600 {path}"],
            input=text.encode(),
            check=True,
        )

    def calls(self):
        """Return the docker calls made there, in order."""
        return [line.partition("> ")[2] for line in self.read("/tmp/docker-calls").splitlines()]


@pytest.fixture(scope="module")
def image():
    docker("build", "--quiet", "--tag", IMAGE, str(IMAGES / "ssh"), seconds=600)


@pytest.fixture
def server(image, tmp_path):
    name = f"{IMAGE}-{secrets.token_hex(4)}"
    docker("run", "--detach", "--rm", "--name", name, "--publish", "127.0.0.1::22", IMAGE)
    try:
        server = SshServer(tmp_path, name)
        wait_until(lambda: _greets(server.port), 20, "sshd answers")
        yield server
    finally:
        with contextlib.suppress(AssertionError):  # it has ended already
            docker("rm", "--force", name)


def _greets(port):
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def machine_b(server, folder="noodle", **options):
    return MachineB(server.remote(**options), folder, lambda line: print("B |", line))


def test_b_is_checked_copied_to_initialised_started_and_stopped(server):
    assert system_of(server.remote(), "linux") == "linux"
    machine = machine_b(server)
    assert machine.check() == "engine 27.1.2, compose 2.29.1"
    machine.copy(ROOT)
    there = set(server.run("sh", "-c", "cd /home/anna/noodle && find . -type f -printf '%P\\n'").splitlines())
    assert there == {*copy.files_to_copy(ROOT), MARKER}
    machine.initialise(JOIN, "192.168.1.102")
    machine.start()
    assert machine.logs() == "stage-1 | ready\n"
    assert machine.stop() == "stopped"
    assert server.calls()[2:] == [
        "compose build init",
        "compose run --rm -T init --machine b --join - --address 192.168.1.102",
        "compose up --detach --build",
        "compose logs --no-color --tail 2000",
        "compose down",
    ]


def test_b_is_given_the_two_secrets_it_needs_and_no_list_of_processes_shows_them(server):
    machine = machine_b(server)
    machine.copy(ROOT)
    machine.initialise(JOIN, "192.168.1.102")
    assert decode(server.read("/tmp/init-input")) == JOIN
    assert JOIN.cluster_token not in server.read("/tmp/docker-calls")
    found = server.run("sh", "-c", "ls -A /home/anna/noodle").split()
    assert not {"models", "tests", "docs", ".git"} & set(found)


def test_a_second_deploy_replaces_files_and_keeps_settings_and_secrets(server, tmp_path):
    machine = machine_b(server)
    machine.copy(ROOT)
    machine.initialise(JOIN, "192.168.1.102")
    server.run("sh", "-c", "echo old >/home/anna/noodle/services/stage/gone.py", user="anna")
    machine.copy(ROOT)
    assert server.read("/home/anna/noodle/services/stage/gone.py") == ""
    assert server.read("/home/anna/noodle/.env") == "COMPOSE_PROFILES=b\n"
    assert server.read("/home/anna/noodle/secrets/x") == "kept\n"


def test_a_folder_that_no_deploy_made_is_left_alone(server):
    server.run(
        "sh", "-c", "mkdir -p /home/anna/noodle/services && echo mine >/home/anna/noodle/services/x", user="anna"
    )
    with pytest.raises(ConfigurationError, match="no deploy put there") as refused:
        machine_b(server).copy(ROOT)
    assert "--there" in refused.value.cure
    assert server.read("/home/anna/noodle/services/x") == "mine\n"
    assert "files" in machine_b(server, folder="a folder/with 'quotes'").copy(ROOT)


def test_stopping_where_nothing_was_deployed_says_so(server):
    assert machine_b(server).stop() == "nothing to stop"


def test_docker_that_this_user_may_not_use_is_told_apart_from_none(server):
    server.run("touch", "/tmp/denied")
    with pytest.raises(StartError, match="permission denied") as refused:
        machine_b(server).check()
    assert "usermod -aG docker" in refused.value.cure
    server.run("rm", "/usr/local/bin/docker")
    with pytest.raises(StartError, match="Docker is not installed") as refused:
        machine_b(server).check()
    assert "get.docker.com" in refused.value.cure


def test_a_build_that_fails_there_ends_with_its_last_line(server):
    machine = machine_b(server)
    machine.copy(ROOT)
    server.run("touch", "/tmp/broken")
    with pytest.raises(StartError, match="no space left on device"):
        machine.start()


def test_a_windows_machine_is_recognised_by_its_shell(server):
    assert system_of(server.remote(user="win"), "linux") == "windows"


def refused_by(remote):
    with pytest.raises(StartError) as refused:
        system_of(remote, "linux")
    return refused.value


def test_each_failure_of_ssh_is_told_apart_with_its_cure(server, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    strange = other.with_suffix(".pub").read_text().split()[1]
    (closed,) = free_ports(1)
    for remote, says, cure in (
        (server.remote(key=other), "refuses this user's key", f"ssh-copy-id anna@{HOST}"),
        (server.remote(user="nobody-there"), "refuses this user's key", "--user NAME"),
        (server.remote(host_key=""), "does not know the host key", "by hand"),
        (server.remote(host_key=strange), "another host key than before", f"ssh-keygen -R {HOST}"),
        (server.remote(port=closed), "no ssh server listens", "openssh-server"),
        (Remote("no-such-machine.invalid", "anna"), "does not resolve", "IP address"),
    ):
        error = refused_by(remote)
        assert says in error.message
        assert cure in error.cure


def test_a_machine_that_drops_packets_is_not_waited_for(server):
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # fill its queue: the kernel then drops packets
                waiting = stack.enter_context(contextlib.closing(socket.socket()))
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            assert "does not answer" in refused_by(server.remote(port=port)).message


def test_the_command_ends_with_the_reason_and_makes_nothing_before(server, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    folder = tmp_path / "noodle"
    folder.mkdir()
    config = server.config(key=other)
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "deploy", "--remote", HOST, "--user", "anna", "--ssh-config", config],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(done.stdout + done.stderr)
    assert done.returncode == 1
    assert "refuses this user's key" in done.stderr
    assert list(Path(folder).iterdir()) == []
