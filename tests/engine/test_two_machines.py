"""Two machines on one engine: two compose projects, a core and a network each, connected by published ports."""

import json
import subprocess
import sys

import pytest

from tests.engine.engine import CONTROL, docker
from tests.engine.pair import FIRST_CUT, two_machines
from tests.support.processes.cluster import wait_until
from tests.support.sampling import sampled

pytestmark = pytest.mark.timeout(900)

# tries every published port as an anonymous client
STRANGER = """
import json, socket, sys, urllib.error, urllib.request
found = {}
for address, port, path in json.loads(sys.argv[1]):
    key = f"{address}:{port}{path}"
    try:
        if path == "valkey":
            with socket.create_connection((address, port), 3) as connection:
                connection.sendall(b"*1\\r\\n$4\\r\\nPING\\r\\n*2\\r\\n$3\\r\\nGET\\r\\n$11\\r\\nnoodle:plan\\r\\n")
                found[key] = connection.recv(400).decode()
        else:
            with urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=3) as answer:
                found[key] = [answer.status, answer.read(400).decode()]
    except urllib.error.HTTPError as error:
        found[key] = [error.code, ""]
    except OSError as error:
        found[key] = ["nothing", str(error)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pair(images, tmp_path_factory):
    """Two machines that are ready; B was started first."""
    with two_machines(tmp_path_factory.mktemp("pair")) as pair:
        pair.b.up()
        pair.a.up()
        print(f"two machines, B first: ready {pair.a.wait_ready():.1f} s after A's up")
        yield pair


def test_the_tokens_are_those_of_the_unsplit_model(pair, model_folder):
    target = ("--url", f"http://{pair.address_a}:{pair.a.port}", "--key", pair.a.api_key)
    command = [sys.executable, "-m", "services.cli", "verify", "--prompts", "6", "--new-tokens", "24", *target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_b_has_fetched_its_own_tensors_and_no_other_byte_and_nothing_when_it_starts_again(pair):
    start, end = pair.layers()[1]
    assert pair.b.fetched_bytes("stage-1") == pair.tensor_bytes(start, end)
    print(f"B fetched {pair.b.fetched_bytes('stage-1')} bytes for layers {start} to {end - 1}")
    pair.b.up(options=("--force-recreate",))
    pair.a.wait_ready()
    wait_until(lambda: pair.b.health(pair.stage_1_port)["status"] == "ready", 120, "B has loaded again")
    assert pair.b.fetched_bytes("stage-1") == 0


def test_a_cut_that_moves_by_a_layer_moves_the_bytes_of_that_layer(pair):
    start, end = pair.layers()[1]
    text = pair.a.env_path.read_text(encoding="utf-8").replace(FIRST_CUT, f"{start - 1},{end - start + 1}")
    pair.a.env_path.write_text(text, encoding="utf-8")
    before = pair.b.fetched_bytes("stage-1")
    pair.a.up("planner")

    def has_one_layer_more():
        state = pair.b.health(pair.stage_1_port)
        return (state["status"], state["detail"]) == ("ready", f"layers {start - 1} to {end - 1}")

    wait_until(has_one_layer_more, 120, "B computes one layer more")
    pair.a.wait_ready()
    moved = pair.b.fetched_bytes("stage-1") - before
    assert moved == pair.tensor_bytes(start - 1, start)
    print(f"the cut moved by a layer: {moved} bytes")


def test_a_third_network_gets_health_and_nothing_else_from_every_port(pair):
    network = f"{pair.networks[0]}-third"
    docker("network", "create", network)
    ports = [
        (pair.address_a, pair.a.port),
        (pair.address_a, pair.a.ports["STAGE_0"]),
        (pair.address_b, pair.stage_1_port),
    ]
    paths = ("/health", "/metrics", "/weights", "/v1/models", "/info", "/activations/1", "/results", "/reports")
    asked = [(address, port, path) for address, port in ports for path in paths]
    asked.append((pair.address_a, pair.a.ports["VALKEY"], "valkey"))
    inside = [
        (
            project.inspect(service)["NetworkSettings"]["Networks"][f"{project.name}_default"]["IPAddress"],
            port,
            "/health",
        )
        for project, service, port in (
            (pair.a, "planner", 8079),
            (pair.a, "coordinator", 8080),
            (pair.b, "stage-1", 8081),
        )
    ]
    try:
        said = docker(
            "run", "--rm", "--network", network, CONTROL, "python", "-c", STRANGER, json.dumps(asked + inside)
        )
    finally:
        docker("network", "rm", network)
    found = json.loads(said)
    for address, port, path in asked:
        answer = found[f"{address}:{port}{path}"]
        if path == "valkey":
            assert answer.splitlines() == ["-NOAUTH Authentication required."] * 2
        elif path == "/health":
            assert answer[0] == 200
            assert set(json.loads(answer[1])) == {"service", "status"}
        else:
            assert answer[0] in (401, 404), (port, path, answer)
    for address, port, path in inside:
        assert found[f"{address}:{port}{path}"][0] == "nothing"


ORDERS = {
    "A first": lambda pair: (pair.a.compose("start"), _says(pair, "stage"), pair.b.compose("start")),
    "B first": lambda pair: (pair.b.compose("start"), _b_waits(pair), pair.a.compose("start")),
    "Valkey last": lambda pair: _last(pair, "valkey", "Valkey at"),
    "planner last": lambda pair: _last(pair, "planner", "the planner"),
    "coordinator last": lambda pair: _last(pair, "coordinator", None),
    "all at once": lambda pair: _both(pair),
}


def _both(pair):
    commands = [["docker", "compose", "start"]] * 2
    running = [
        subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.DEVNULL)
        for command, project in zip(commands, (pair.a, pair.b), strict=True)
    ]
    assert [each.wait(120) for each in running] == [0, 0]


def _says(pair, what):
    """Wait until A's /health names `what` among the things it waits for."""
    wait_until(lambda: any(what in each for each in pair.a.health().get("waiting_for", [])), 120, f"waits for {what}")


def _b_waits(pair):
    wait_until(lambda: pair.b.health(pair.stage_1_port).get("detail"), 60, "B reports what it waits for")


def _last(pair, service, said):
    """Start everything but one part, check that the others report waiting, then start that part."""
    containers = {
        name: pair.a.container(name) for name in ("valkey", "planner", "coordinator", "stage-0", "prometheus")
    }
    docker("start", *(each for name, each in containers.items() if name != service))
    pair.b.compose("start")
    if said is not None:
        _says(pair, said)
    else:
        _b_waits(pair)
    docker("start", containers[service])


@sampled("order", ORDERS, ("A first", "coordinator last", "all at once"))
def test_any_order_of_starting_gets_ready_by_itself(pair, order):
    pair.cut_power()
    ORDERS[order](pair)
    seconds = pair.a.wait_ready()
    print(f"{order}: ready {seconds:.1f} s after the last start")
    assert len(pair.a.generate("The sky is blue because", 8)) == 8
