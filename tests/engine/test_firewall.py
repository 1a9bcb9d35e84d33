"""noodle firewall's rules on a real kernel: access to published ports before, after, after a reboot, and undone.

Everything happens in one container with rights over its own network only: its namespaces are machine A, machine B and
another machine. The host's chains are never touched.
"""

import contextlib
import json
import secrets

import pytest

from tests.engine.engine import IMAGES, ROOT, docker, run
from tests.support.processes.cluster import wait_until

pytestmark = pytest.mark.timeout(600)
IMAGE = "noodle-test-firewall"
A = "10.77.0.1"
OURS = (8080, 6379, 8081, 3000)
OTHERS = 9999  # of another program's container, published by the same engine
SSH = 22
TRY_SECONDS = "2"
ENV = """\
COMPOSE_PROFILES=a
NOODLE_LAN_ADDRESS=10.77.0.1
NOODLE_PEER_ADDRESS=10.77.0.2
"""
SYSTEMCTL = """\
#!/bin/sh
echo "$@" >>/tmp/systemctl
"""
SYSTEMCTL_PATH = "/usr/local/bin/systemctl"
UNIT = "/etc/systemd/system/noodle-firewall.service"
TRY = """
import json, socket, sys, threading
address, seconds, *ports = sys.argv[1:]
found = {}
def connect(port):
    try:
        with socket.create_connection((address, int(port)), float(seconds)) as connection:
            connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            found[port] = "open" if connection.recv(4) == b"HTTP" else "odd"
    except TimeoutError:
        found[port] = "dropped"
    except OSError as error:
        found[port] = str(error)
threads = [threading.Thread(target=connect, args=(port,)) for port in ports]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""


class MachineA:
    """The container."""

    def __init__(self, name):
        self.name = name

    def run(self, *command):
        return run(["docker", "exec", "--workdir", "/project", self.name, *command])

    def noodle(self, *arguments):
        return self.run("env", "PYTHONPATH=/noodle:/noodle/shared", "python3", "-m", "services.cli", *arguments)

    def tried(self, who, *ports, address=A):
        """Return the outcome of connections from a namespace to ports of A, made at once."""
        asked = [address, TRY_SECONDS, *map(str, ports)]
        done = self.run("ip", "netns", "exec", who, "python3", "-c", TRY, *asked)
        assert done.returncode == 0, done.stderr
        return {int(port): what for port, what in json.loads(done.stdout).items()}

    def all_tried(self, who):
        return self.tried(who, *OURS, OTHERS, SSH)

    def rules(self):
        return self.run("iptables", "-S").stdout


@pytest.fixture(scope="module")
def image():
    docker("build", "--quiet", "--tag", IMAGE, str(IMAGES / "firewall"), seconds=600)


@pytest.fixture(scope="module")
def running(image):
    name = f"{IMAGE}-{secrets.token_hex(4)}"
    mounts = [f"{ROOT}:/noodle:ro", f"{IMAGES / 'firewall/network.sh'}:/network.sh:ro"]
    volumes = [part for mount in mounts for part in ("--volume", mount)]
    rights = ["--cap-add", "NET_ADMIN", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"]
    rights += ["--security-opt", "apparmor=unconfined", "--sysctl", "net.ipv4.ip_forward=1"]
    options = [*rights, "--network", "none", "--tmpfs", "/project", *volumes]
    docker("run", "--detach", "--rm", "--name", name, *options, IMAGE, "/network.sh")
    machine = MachineA(name)
    try:
        wait_until(lambda: machine.run("test", "-e", "/tmp/network-is-up").returncode == 0, 30, "the network is up")
        machine.run("sh", "-c", f"printf '{ENV}' > /project/.env")
        wait_until(lambda: machine.all_tried("b") == OPEN_TO_ALL, 30, "every port answers")
        yield machine
    finally:
        with contextlib.suppress(AssertionError):  # it has ended already
            docker("rm", "--force", name)


@pytest.fixture
def machine(running):
    """The container as Docker left it."""
    yield running
    running.noodle("firewall", "--undo")
    running.run("rm", "-rf", "/run/systemd", SYSTEMCTL_PATH)


OPEN_TO_ALL = dict.fromkeys((*OURS, OTHERS, SSH), "open")
OF_B = {**OPEN_TO_ALL, 3000: "dropped"}  # Grafana is open to users
OF_A_STRANGER = {**dict.fromkeys(OURS, "dropped"), OTHERS: "open", SSH: "open"}


def test_ports_close_to_strangers_stay_open_to_b_and_ssh_is_not_touched(machine):
    assert machine.all_tried("stranger") == OPEN_TO_ALL
    done = machine.noodle("firewall", "--apply")
    assert done.returncode == 0, done.stderr
    assert machine.all_tried("b") == OF_B
    assert machine.all_tried("stranger") == OF_A_STRANGER


def test_showing_changes_nothing_and_says_what_would_be(machine):
    before = machine.rules()
    done = machine.noodle("firewall")
    assert done.returncode == 0, done.stderr
    assert "8080 coordinator" in done.stdout
    assert "Nothing was changed" in done.stdout
    assert machine.rules() == before
    assert machine.all_tried("stranger") == OPEN_TO_ALL


def test_undoing_leaves_no_rule_and_twice_is_as_once(machine):
    before = machine.rules()
    for arguments in (("--apply",), ("--apply",), ("--undo",), ("--undo",)):
        done = machine.noodle("firewall", *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        if arguments == ("--apply",):
            assert machine.rules().count("-A DOCKER-USER -j NOODLE") == 1
    assert machine.rules() == before
    assert machine.run("test", "-e", "/usr/local/sbin/noodle-firewall").returncode == 1
    assert machine.all_tried("stranger") == OPEN_TO_ALL


def test_people_may_come_to_grafana_and_the_coordinator_from_where_it_is_said(machine):
    assert machine.noodle("firewall", "--apply", "--clients", "10.77.0.3").returncode == 0
    assert machine.all_tried("stranger") == {**OF_A_STRANGER, 8080: "open", 3000: "open"}
    assert machine.noodle("firewall", "--apply").returncode == 0  # the newest options replace the earlier ones
    assert machine.all_tried("stranger") == OF_A_STRANGER


def test_after_a_boot_the_script_sets_the_same_rules_again(machine):
    assert machine.noodle("firewall", "--apply").returncode == 0
    rules = machine.rules()
    machine.run(
        "sh",
        "-c",
        "iptables -F DOCKER-USER && iptables -A DOCKER-USER -j RETURN && iptables -F NOODLE && iptables -X NOODLE",
    )
    assert machine.all_tried("stranger") == OPEN_TO_ALL
    assert machine.run("/usr/local/sbin/noodle-firewall").returncode == 0
    assert machine.rules() == rules
    assert machine.all_tried("stranger") == OF_A_STRANGER


def test_where_systemd_is_a_unit_runs_it_at_each_boot(machine):
    make = f"mkdir -p /run/systemd/system; printf '{SYSTEMCTL}' >{SYSTEMCTL_PATH}; chmod +x {SYSTEMCTL_PATH}"
    machine.run("sh", "-c", make)
    assert machine.noodle("firewall", "--apply").returncode == 0
    assert "ExecStart=/usr/local/sbin/noodle-firewall" in machine.run("cat", UNIT).stdout.splitlines()
    asked = machine.run("cat", "/tmp/systemctl").stdout.splitlines()
    assert asked == ["daemon-reload", "enable --quiet noodle-firewall.service"]
    assert machine.noodle("firewall", "--undo").returncode == 0
    assert machine.run("test", "-e", UNIT).returncode == 1


def test_a_rule_on_the_way_does_not_cut_what_answers_from_inside(machine):
    """A container of A that connects to B gets its answer: only traffic to published ports is filtered."""
    assert machine.noodle("firewall", "--apply").returncode == 0
    server = (
        "import socket; s = socket.create_server(('10.77.0.2', 7000)); c, _ = s.accept(); c.recv(9); c.sendall(b'HTTP')"
    )
    docker("exec", "--detach", machine.name, "ip", "netns", "exec", "b", "python3", "-c", server)
    asked = {"address": "10.77.0.2"}
    wait_until(lambda: machine.tried("inside", 7000, **asked) == {7000: "open"}, 10, "B answers")


def test_without_docker_or_without_root_it_says_what_to_do(machine):
    machine.run("iptables", "-E", "DOCKER-USER", "ELSEWHERE")
    done = machine.noodle("firewall", "--apply")
    machine.run("iptables", "-E", "ELSEWHERE", "DOCKER-USER")
    assert done.returncode == 1
    assert "systemctl start docker" in done.stderr
    done = machine.run(
        "setpriv",
        "--reuid=65534",
        "env",
        "PYTHONPATH=/noodle:/noodle/shared",
        "python3",
        "-m",
        "services.cli",
        "firewall",
        "--apply",
    )
    assert done.returncode == 1
    assert "sudo deploy/firewall.sh --apply" in done.stderr


def test_the_doctor_sees_whether_the_ports_are_closed(machine):
    def found():
        lines = machine.noodle("doctor").stdout.splitlines()
        return [line for line in lines if " firewall " in line]

    assert "WARNING" in found()[0]
    assert machine.noodle("firewall", "--apply").returncode == 0
    assert found()[0].startswith("ok")
