"""`noodle doctor` against real services on loopback."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from noodle.cluster.plan import MachineReport
from noodle.cluster.valkey import WorkQueue
from services.cli.local.valkey import server_binary
from tests.support.network.http_stand_in import http_stand_in
from tests.support.processes.cluster import free_ports, request, wait_until

NOWHERE = "no-such-machine.invalid"
WRONG_TOKEN = "another-token-of-some-length"
WHOLE_SECONDS = 30.0


def doctor(environment, tmp_path, **variables):
    """Run the command with these variables alone, or in a cluster's environment; return exit code and report."""
    kept = {name: value for name, value in environment.items() if not name.startswith("NOODLE_")}
    given = variables or {name: value for name, value in environment.items() if name.startswith("NOODLE_")}
    if variables:
        given = {"NOODLE_STATE_DIR": str(tmp_path / "no-run"), "NOODLE_CACHE_DIR": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "doctor", "--json"],
        env={**kept, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WHOLE_SECONDS + 30,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def by_hand(cluster, tmp_path, **changes):
    """Run doctor as the machine of stage 1, with the cluster's secrets unless changed."""
    variables = {
        "NOODLE_COORDINATOR_URL": cluster.url,
        "NOODLE_VALKEY_URL": f"redis://127.0.0.1:{cluster.valkey_port}",
        "NOODLE_VALKEY_PASSWORD": valkey_password(cluster),
        "NOODLE_CLUSTER_TOKEN": cluster.token,
        "NOODLE_STAGE_ID": "1",
        "NOODLE_ADVERTISE_URL": f"http://127.0.0.1:{cluster.stage_ports[1]}",
        **changes,
    }
    return doctor(cluster.environment, tmp_path, **variables)


def valkey_password(cluster):
    return (cluster.state_dir / "run" / "valkey_password").read_text(encoding="utf-8").strip()


def findings(report, status="error"):
    return [(outcome["check"], outcome["what"]) for outcome in report["outcomes"] if outcome["status"] == status]


def of_check(report, check):
    return [outcome for outcome in report["outcomes"] if outcome["check"] == check]


def test_a_running_cluster_is_in_order(cluster, tmp_path):
    code, report = doctor(cluster.environment, tmp_path)
    assert code == 0, findings(report)
    assert report["role"] == "noodle up"
    assert report["seconds"] < WHOLE_SECONDS
    reached = [outcome["what"] for outcome in of_check(report, "reach")]
    assert len(reached) == 5  # valkey, planner, coordinator and two stages
    assert all(outcome["status"] == "ok" for outcome in of_check(report, "reach") + of_check(report, "port"))
    assert sum("MB/s" in what for what in reached) == 4
    told = {outcome["what"].split(" reaches ")[0] for outcome in of_check(report, "way back")}
    assert told == {"coordinator", "planner", "stage 0", "stage 1"}
    for check in ("version", "weights", "plan", "memory", "disk", "names", "firewall"):
        assert [outcome["status"] for outcome in of_check(report, check)] == ["ok"], check


def test_every_finding_and_every_skipped_check_says_why(cluster, tmp_path):
    _, report = by_hand(cluster, tmp_path, NOODLE_CLUSTER_TOKEN=WRONG_TOKEN)
    for outcome in report["outcomes"]:
        assert outcome["what"]
        if outcome["status"] in ("warning", "error"):
            assert outcome["why"], outcome
            assert outcome["cure"], outcome


def test_another_cluster_token_is_told_apart_from_a_service_that_is_away(cluster, tmp_path):
    code, report = by_hand(cluster, tmp_path, NOODLE_CLUSTER_TOKEN=WRONG_TOKEN)
    assert code == 1
    locked = [what for check, what in findings(report) if check == "lock"]
    assert len(locked) == 2  # coordinator and stage
    assert all("refuses the cluster token" in what for what in locked)


def test_a_closed_port_is_refused(cluster, tmp_path):
    (closed,) = free_ports(1)
    code, report = by_hand(cluster, tmp_path, NOODLE_COORDINATOR_URL=f"http://127.0.0.1:{closed}")
    assert code == 1
    assert ("reach", f"coordinator at http://127.0.0.1:{closed}: refused, nothing listens on that port.") in findings(
        report
    )


def test_a_name_that_does_not_resolve_is_told(cluster, tmp_path):
    code, report = by_hand(cluster, tmp_path, NOODLE_COORDINATOR_URL=f"http://{NOWHERE}:8080")
    assert code == 1
    assert ("names", f"The name '{NOWHERE}' does not resolve.") in findings(report)


def test_a_wrong_valkey_password_is_told(cluster, tmp_path):
    code, report = by_hand(cluster, tmp_path, NOODLE_VALKEY_PASSWORD="wrong")
    assert code == 1
    assert any("refuses the Valkey password" in what for _, what in findings(report))


@contextlib.contextmanager
def another_valkey(*options):
    """Run a Valkey with these options; yield its port."""
    (port,) = free_ports(1)
    command = [server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _connects(port), 10, "Valkey answers")
        yield port
    finally:
        process.terminate()
        process.wait(30)


def test_a_valkey_without_a_password_is_an_error(cluster, tmp_path):
    with another_valkey() as port:
        code, report = by_hand(cluster, tmp_path, NOODLE_VALKEY_URL=f"redis://127.0.0.1:{port}")
    assert code == 1
    locks = [what for check, what in findings(report) if check == "lock"]
    assert any("accepts commands without a password" in what for what in locks)


def test_a_user_of_valkey_who_may_read_all_is_a_warning(cluster, tmp_path):
    password = "a-password-of-some-length"
    user = ("--user", "noodle", "on", f">{password}", "~*", "+@all", "--user", "default", "off")
    with another_valkey(*user) as port:
        url = f"redis://noodle@127.0.0.1:{port}"
        _, report = by_hand(cluster, tmp_path, NOODLE_VALKEY_URL=url, NOODLE_VALKEY_PASSWORD=password)
    assert any("may read keys that are not noodle's" in what for _, what in findings(report, "warning"))


def test_dropped_packets_are_told_in_time(cluster, tmp_path):
    with deaf_ports(2) as (first, second):
        began = time.monotonic()
        code, report = by_hand(
            cluster,
            tmp_path,
            NOODLE_COORDINATOR_URL=f"http://127.0.0.1:{first}",
            NOODLE_VALKEY_URL=f"redis://127.0.0.1:{second}",
            NOODLE_ADVERTISE_URL=f"http://127.0.0.1:{first}",
        )
        assert time.monotonic() - began < WHOLE_SECONDS
    assert code == 1
    silent = [what for check, what in findings(report) if check == "reach"]
    assert len(silent) == 3
    assert all("a firewall drops the packets" in what for what in silent)


def test_another_program_on_the_port_is_told(cluster, tmp_path):
    with http_stand_in() as stand_in:
        stand_in.answer("/health", {"hello": "world"})
        code, report = by_hand(cluster, tmp_path, NOODLE_COORDINATOR_URL=stand_in.url)
    assert code == 1
    assert any("another program answers there, not noodle" in what for _, what in findings(report))


def test_a_stage_that_says_it_is_at_localhost_is_found_by_the_others(cluster, tmp_path):
    work_queue = WorkQueue(f"redis://127.0.0.1:{cluster.valkey_port}", valkey_password(cluster))
    of_stage_0 = work_queue.reports()[0]
    wrong = msgspec.structs.replace(of_stage_0, stage_id=7, machine="pc", url="http://localhost:1")
    with beating(work_queue, wrong):
        code, report = doctor(cluster.environment, tmp_path)
    assert code == 1
    (address,) = [outcome for outcome in of_check(report, "address") if outcome["where"] == "pc"]
    assert address["status"] == "error"
    assert "localhost means the machine that uses it" in address["what"]
    assert any("coordinator to stage 7" in what and "refused" in what for _, what in findings(report))


def test_another_version_and_other_weights_among_the_registered_are_told(cluster, tmp_path):
    work_queue = WorkQueue(f"redis://127.0.0.1:{cluster.valkey_port}", valkey_password(cluster))
    of_stage_0 = work_queue.reports()[0]
    other = msgspec.structs.replace(
        of_stage_0, stage_id=7, noodle_version="0.0.1", model_digest="0" * 64, url="http://127.0.0.1:1"
    )
    with beating(work_queue, other):
        _, report = doctor(cluster.environment, tmp_path)
    told = dict(findings(report))
    assert "stage 7 has 0.0.1" in told["version"]
    assert "stage 7 has 000000000000" in told["weights"]


@pytest.mark.parametrize("path", ["/doctor/reach", "/doctor/bytes"])
def test_the_doctors_routes_want_the_cluster_token_everywhere(cluster, path):
    for port in [cluster.port, *cluster.stage_ports]:
        assert request(port, "GET", path)[0] == 401
        assert request(port, "GET", path, token=WRONG_TOKEN)[0] == 401
        assert request(port, "GET", path, token=cluster.token)[0] == 200


def test_the_way_back_tries_no_address_that_the_question_brings(cluster):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        path = f"/doctor/reach?url=http://127.0.0.1:{port}&target=127.0.0.1:{port}"
        assert request(cluster.port, "GET", path, token=cluster.token, Host=f"127.0.0.1:{port}")[0] == 200
        with pytest.raises(TimeoutError):
            listener.accept()


def test_bytes_are_bounded(cluster):
    for count in ("0", "-1", "8388609", "1e3", ""):
        status, answer = request(cluster.port, "GET", f"/doctor/bytes?count={count}", token=cluster.token)
        assert (status, answer["error"]["param"]) == (400, "count"), count
    status, content = request(cluster.port, "GET", "/doctor/bytes?count=8388608", token=cluster.token)
    assert (status, len(content)) == (200, 8 << 20)


def _connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def beating(work_queue: WorkQueue, report: MachineReport):
    """Keep a stage's report alive for as long as the block runs."""
    over = threading.Event()

    def beat():
        while not over.is_set():
            work_queue.put_report(report)
            over.wait(1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def deaf_ports(count):
    """Yield ports whose accept queue is full, so that the kernel drops packets as a firewall does."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(contextlib.closing(socket.socket()))
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            for _ in range(4):
                waiting = stack.enter_context(contextlib.closing(socket.socket()))
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            ports.append(port)
        yield ports
