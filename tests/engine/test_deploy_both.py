"""deploy/deploy-to-remote.sh from nothing to verified tokens: machine A here, machine B behind an OpenSSH server.

B's docker is this engine: the machines are two compose projects that reach each other at published ports.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.engine import CONTROL, IMAGES, STAGE, docker, run
from tests.engine.project import Project
from tests.engine.test_deploy import SshServer, _greets
from tests.support.processes.cluster import wait_until

pytestmark = pytest.mark.timeout(1800)
IMAGE = "noodle-test-ssh"
DEPLOY_SECONDS = 1200.0
PLUGINS = ("/usr/local/lib/docker/cli-plugins", "/usr/libexec/docker/cli-plugins", "/usr/lib/docker/cli-plugins")


def gateway(network):
    return json.loads(docker("network", "inspect", network))[0]["IPAM"]["Config"][0]["Gateway"]


@pytest.fixture
def addresses(tmp_path):
    """Two addresses of this host, each of a network made for it."""
    networks = [f"noodle-test-deploy-{name}-{secrets.token_hex(4)}" for name in ("a", "b")]
    try:
        for network in networks:
            docker("network", "create", network)
        yield [gateway(network) for network in networks]
    finally:
        for network in networks:
            run(["docker", "network", "rm", network])


@pytest.fixture
def server_with_engine(images, tmp_path):
    """Machine B with a home at the same path inside and outside, because the engine mounts folders of this host."""
    home = tmp_path / "home-of-anna"
    home.mkdir()
    docker("build", "--quiet", "--tag", IMAGE, str(IMAGES / "ssh"), seconds=600)
    client = shutil.which("docker")
    mounts = [f"{home}:{home}", "/var/run/docker.sock:/var/run/docker.sock", f"{client}:/usr/local/bin/docker:ro"]
    mounts += [f"{folder}:{folder}:ro" for folder in PLUGINS if Path(folder).is_dir()]
    volumes = [part for mount in mounts for part in ("--volume", mount)]
    name = f"{IMAGE}-{secrets.token_hex(4)}"
    docker("run", "--detach", "--rm", "--name", name, "--publish", "127.0.0.1::22", *volumes, IMAGE)
    try:
        server = SshServer(tmp_path, name)
        server.home = home
        wait_until(lambda: _greets(server.port), 20, "sshd answers")
        group = 'getent group "$gid" >/dev/null || groupadd -g "$gid" engine'
        server.run("sh", "-c", f"gid=$(stat -c %g /var/run/docker.sock); {group}; usermod -aG $gid -d {home} anna")
        server.run("sh", "-c", f"mkdir -m 700 {home}/.ssh && cp /home/anna/.ssh/authorized_keys {home}/.ssh/")
        server.run("sh", "-c", f"chown -R anna {home} && chmod 755 {home}")
        yield server
    finally:
        with contextlib.suppress(AssertionError):  # it has ended already
            docker("rm", "--force", name)


def deploy(folder, environment, *arguments):
    script = folder / "deploy" / "deploy-to-remote.sh"
    done = subprocess.run(
        [script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEPLOY_SECONDS,
        check=False,
    )
    print(done.stdout)
    return done


def test_both_machines_from_one_script_again_and_down(server_with_engine, addresses, tmp_path):
    server, (address_a, address_b) = server_with_engine, addresses
    folder_a = tmp_path / "a"
    folder_a.mkdir()
    a = Project(folder_a, core=0)
    a.kind = "a"
    (folder_b := server.home / "noodle").mkdir()
    prepare_b(folder_b, tmp_path)
    config = server.config()
    config.write_text(config.read_text().replace("Host machine-b.test", f"Host {address_b}"))
    remote = (address_b, "--user", "anna", "--address", address_a, "--ssh-config", str(config))
    environment = {**a.environment, "PATH": os.environ["PATH"]}
    os.symlink(Path(__file__).parents[2] / ".venv", folder_a / ".venv")
    with_test_images(folder_a)
    try:
        done = deploy(folder_a, environment, *remote)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert f"Ready: http://{address_a}:{a.port}/v1" in done.stdout
        assert "The split changes nothing beyond rounding." in done.stdout
        (results,) = (folder_a / "deploy-results").iterdir()
        assert json.loads((results / "verify.json").read_text())["verdict"]["broken"] == []
        assert "stage-1" in (results / "machine-b.log").read_text()
        assert {path.name for path in (folder_b / "secrets").iterdir()} == {"cluster_token", "valkey_password"}
        assert not (folder_b / "tests").exists()
        in_order(folder_a, a.environment, {"coordinator", "stage 0", "stage 1"})
        in_order(folder_b, a.environment, {"coordinator", "stage 0", "stage 1"})
        before = [a.container("coordinator"), a.container("stage-0")]
        again = deploy(folder_a, environment, *remote, "--no-verify")
        assert again.returncode == 0, again.stdout + again.stderr[-4000:]
        assert [a.container("coordinator"), a.container("stage-0")] == before
        assert (
            deploy(folder_a, environment, address_b, "--user", "anna", "--ssh-config", str(config), "--stop").returncode
            == 0
        )
        assert a.compose("ps", "--quiet") == ""
    finally:
        a.down()
        run(["docker", "compose", "down", "--volumes", "--remove-orphans"], cwd=folder_b, env=a.environment)
    assert a.left_behind() == []


def in_order(folder, environment, told):
    """Run noodle doctor in a machine's folder: no error, and these services report whom they reach."""
    command = [sys.executable, "-m", "services.cli", "doctor"]
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 60, "check": False}
    print(subprocess.run(command, **options).stdout)
    done = subprocess.run([*command, "--json"], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(done.stdout)["outcomes"]
    back = {each["what"].split(" reaches ")[0] for each in outcomes if each["check"] == "way back"}
    assert told <= back
    assert all(each["status"] != "error" for each in outcomes)


def with_test_images(folder):
    """Write the overrides of these tests: images built from the cache, and no Grafana."""
    path = folder / "docker-compose.test.yml"
    overrides = json.loads(path.read_text())
    services = overrides["services"]
    services["grafana"] = {"image": CONTROL, "entrypoint": ["sleep", "infinity"], "volumes": []}
    path.write_text(json.dumps(overrides))


def prepare_b(folder, tmp_path):
    """Prepare B's folder as after an earlier deploy, with the settings of these tests."""
    scratch = tmp_path / "scratch-b"
    scratch.mkdir()
    b = Project(scratch, core=1)
    shutil.copy2(scratch / "docker-compose.test.yml", folder / "docker-compose.test.yml")
    shutil.copy2(scratch / ".env", folder / ".env")
    (folder / ".noodle-deployed").touch()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o777)
    assert STAGE in (folder / "docker-compose.test.yml").read_text()
    return b
