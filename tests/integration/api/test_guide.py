"""The user's guide on a real cluster: its script, its routes, and forwards by hand beside other requests."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.cli.client.http_client import get_json
from tests.integration.conftest import ALICE
from tests.support.clients.forward_by_hand import generate_by_hand
from tests.support.models.prompts import PROMPTS
from tests.support.processes.cluster import request, running_cluster, wait_until

pytestmark = pytest.mark.timeout(600)
SCRIPT = Path(__file__).parents[2] / "support" / "clients" / "guide_test_distributed.py"
HIDDEN_SIZE = 64
NODES = [
    {"node_id": "laptop", "device_type": "cuda", "vram_gb": 4},
    {"node_id": "pc", "device_type": "cpu", "ram_gb": 16},
]


def stage_paths(cluster):
    return [f"{cluster.url}/stage/{index}" for index in range(cluster.stages)]


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    """Two stages of the tiny model, not shared: forwards by hand leave sessions on them."""
    with running_cluster(tmp_path_factory.mktemp("guide") / "state", tiny_folder, 2) as running:
        yield running


def generated_ids(cluster, prompt, new_tokens, **parameters):
    asked = {"max_new_tokens": new_tokens, "ignore_eos": True, "details": True, **parameters}
    details = cluster.generate(prompt, **asked)["details"]
    return details["prompt_token_ids"], [token["id"] for token in details["tokens"]]


def test_the_guides_script_runs_with_only_addresses_key_and_hidden_size_set(cluster):
    first, second = (f"http://127.0.0.1:{port}" for port in cluster.stage_ports)
    places = ["--coordinator", cluster.url, "--local", first, "--worker", second]
    done = subprocess.run(
        [sys.executable, SCRIPT, *places, "--key", cluster.token, "--hidden-size", str(HIDDEN_SIZE)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 6
    assert "tokens/s" in done.stdout


@pytest.mark.parametrize("prompt", ["abc", "a longer prompt with the cat and the dog " * 4])
def test_forwards_by_hand_generate_what_generate_does(cluster, prompt):
    prompt_ids, expected = generated_ids(cluster, prompt, 24)
    assert generate_by_hand(stage_paths(cluster), "", prompt_ids, 24) == expected
    assert generate_by_hand(stage_paths(cluster), "", prompt_ids, 24, chunk_tokens=3) == expected


def test_forwards_beside_a_served_request_change_no_token_of_it(cluster):
    _, expected = generated_ids(cluster, "beside", 120, temperature=0.9, seed=4)
    stop = threading.Event()
    statuses = []

    def forward_all_the_time():
        while not stop.is_set():
            body = {"session_id": "noise", "token_ids": [7] * 100, "token_index": 0}
            statuses.append(cluster.post("/stage/0/forward", body)[0])
            statuses.append(cluster.post("/stage/0/forward", {**body, "session_id": "other noise"})[0])

    thread = threading.Thread(target=forward_all_the_time)
    thread.start()
    try:
        _, got = generated_ids(cluster, "beside", 120, temperature=0.9, seed=4)
    finally:
        stop.set()
        thread.join()
    assert got == expected
    assert len(statuses) > 2
    assert set(statuses) == {200}


def test_a_stage_that_is_loaded_again_by_hand_costs_a_running_request_time_not_tokens(cluster):
    _, expected = generated_ids(cluster, "loaded again", 200)
    result = {}
    thread = threading.Thread(target=lambda: result.update(got=generated_ids(cluster, "loaded again", 200)[1]))
    thread.start()
    wait_until(lambda: cluster.kv_bytes_held() > 0, 10, "the request runs")
    status, answer = request(cluster.stage_ports[1], "POST", "/load_model/1", {"reload": True}, token=cluster.token)
    thread.join()
    assert (status, answer["success"]) == (200, True), answer
    assert result["got"] == expected


def test_a_stages_refusals_come_through_the_coordinator(cluster):
    body = {"session_id": "x", "activations": [0.1, 0.2, 0.3], "token_index": 0, "stage_id": 1}
    status, answer = cluster.post("/stage/1/forward", body)
    assert (status, answer["success"]) == (422, False)
    assert "64" in answer["error"]["message"]
    status, answer = cluster.post("/stage/7/forward", body)
    assert (status, answer["success"]) == (404, False)
    assert "0, 1" in answer["error"]["message"]
    assert cluster.post("/stage/1/forward", {**body, "stage_id": 0})[0] == 404
    gap = {"session_id": "gap", "token_ids": [5], "token_index": 9}
    status, answer = cluster.post("/stage/0/forward", gap)
    assert (status, answer["error"]["param"]) == (409, "token_index")
    assert cluster.post("/stage/0/forward", b"x" * 10, Content_Type="text/plain")[0] == 415
    assert cluster.post("/stage/0/forward", b" " * (9 << 20))[0] == 413
    assert cluster.post("/stage/0/forward", gap, Host="evil.example")[0] == 401


def test_a_plan_is_only_looked_at(cluster):
    before = cluster.get("/health")[1]["plan"]
    for body in ({"available_nodes": NODES}, NODES, {}, None):
        status, answer = cluster.post("/plan/generate", body)
        assert (status, answer["success"]) == (200, True), answer
    own = answer["plan"]
    assert (own["is_active"], own["active_version"]) == (True, before)
    assert {stage["sources"]["layer_seconds"] for stage in own["stages"]} == {"measured"}
    assert cluster.get("/health")[1]["plan"] == before


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b'"nodes"', 400, "list"),
        ({"available_nodes": []}, 400, "available_nodes"),
        ({"available_nodes": [5]}, 400, "available_nodes"),
        ({"available_nodes": [NODES[0]] * 2}, 400, "laptop"),
        ({"available_nodes": [{**NODES[0], "node_id": str(number)} for number in range(65)]}, 400, "64"),
        ([{"node_id": "x", "device_type": "tpu", "ram_gb": 4}], 422, "tpu"),
        ([{"node_id": "x", "device_type": "cpu", "vram_gb": 4}], 400, "ram_gb"),
        ([{"node_id": "x", "device_type": "cpu", "ram_gb": -4}], 400, "ram_gb"),
        ([{"node_id": "x", "device_type": "cpu", "ram_gb": "four"}], 400, "ram_gb"),
        ([{"node_id": "x", "device_type": "cpu", "ram_gb": 4, "dtype": "int3"}], 422, "int3"),
        ([{"node_id": str(number), "device_type": "cpu", "ram_gb": 4} for number in range(7)], 422, "6 layers"),
        ({"available_nodes": NODES, "split": [3, 4]}, 422, "7 layers"),
        ({"available_nodes": NODES, "context_length": 100_000}, 422, "256"),
    ],
)
def test_a_plan_that_means_nothing_is_refused_by_name(cluster, body, status, word):
    got, answer = cluster.post("/plan/generate", body)
    assert (got, answer["success"]) == (status, False), answer
    assert word in answer["error"]["message"]


def test_a_plan_that_does_not_fit_says_how_much_is_short_where_and_what_would_cure_it(cluster):
    tiny = [{"node_id": "tiny", "device_type": "cpu", "ram_gb": 0.0005}]
    status, answer = cluster.post("/plan/generate", tiny)
    assert (status, answer["success"], answer["error"]["code"]) == (422, False, "plan_does_not_fit")
    short = answer["short"]
    assert short["memories"][0]["machine"] == "tiny"
    assert short["short_bytes"] == short["memories"][0]["needed_bytes"] - short["memories"][0]["usable_bytes"] > 0
    assert "another_machine" in {cure["kind"] for cure in short["cures"]}


def test_the_plan_command_prints_a_line_a_machine_and_the_cures(cluster, tmp_path):
    done = cluster.noodle("plan")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " cpu " in line]
    assert len(lines) == cluster.stages
    assert all(" m" in line and " c" in line for line in lines)
    assert "tokens/s" in done.stdout
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps({"available_nodes": NODES}), encoding="utf-8")
    done = cluster.noodle("plan", "--nodes", str(file), "--json")
    assert done.returncode == 0, done.stderr
    assert [stage["node_id"] for stage in json.loads(done.stdout)["plan"]["stages"]] == ["laptop", "pc"]
    done = cluster.noodle("plan", "--nodes", "-", stdin='[{"node_id": "a", "device_type": "cpu", "ram_gb": 0.0005}]')
    assert done.returncode == 1
    assert "bytes short" in done.stdout
    assert "NOODLE_WEIGHTS" in done.stdout
    for text in ("{", "5", '[{"node_id": "a"}]'):
        done = cluster.noodle("plan", "--nodes", "-", stdin=text)
        assert (done.returncode, done.stdout) == (1, "")
        assert "noodle:" in done.stderr


def test_metrics_are_kept_and_shown(cluster):
    for body in (
        {"node_id": "pc", "metrics": {"tokens_per_second": 3.5, "memory_mb": 900}},
        {"node": "pc", "cpu_percent": 12.5},
        [{"node_id": "pc", "metric": "latency_ms", "value": index} for index in range(3)],
    ):
        status, answer = cluster.post("/log_metrics", body)
        assert (status, answer["success"]) == (200, True), answer
    kept = cluster.get("/log_metrics?last=100")[1]["entries"]  # among the stages' own entries
    entries = [entry for entry in kept if entry["node_id"] == "pc"]
    assert [entry["metrics"] for entry in entries] == [
        {"tokens_per_second": 3.5, "memory_mb": 900},
        {"cpu_percent": 12.5},
        *({"metric": "latency_ms", "value": index} for index in range(3)),
    ]
    for answered in ((1, 0), (0, 1)):  # the second time it is already stored
        body = {"node_id": "pc", "entry_id": "only once", "metrics": {"value": 1}}
        answer = cluster.post("/log_metrics", body)[1]
        assert (answer["stored"], answer["already_stored"]) == answered
    for body in (b"{", {}, [], 5, [5], {"node_id": "x", "text": "y" * 70_000}):
        status, answer = cluster.post("/log_metrics", body)
        assert (status, answer["success"]) == (400, False)
    for last in ("0", "1001", "-1", "ten", "0x5", "%D9%A3", "", "0000005555"):
        assert cluster.get(f"/log_metrics?last={last}")[0] == 400
    assert len(cluster.get("/log_metrics?last=2")[1]["entries"]) == 2


def test_with_an_api_key_the_coordinators_routes_want_it_and_a_lost_stage_is_said(keyed):
    body = {"session_id": "x", "token_ids": [5]}
    for method, path, sent in (
        ("POST", "/stage/0/forward", body),
        ("POST", "/plan/generate", {}),
        ("POST", "/log_metrics", {"node_id": "x", "a": 1}),
        ("GET", "/log_metrics", None),
    ):
        for token in ("", "wrong-token-of-some-length"):
            status, answer = request(keyed.port, method, path, sent, token=token)
            assert (status, answer["success"]) == (401, False)
        for token in (ALICE, keyed.token):
            assert request(keyed.port, method, path, sent, token=token)[0] == 200
    # a client's key gives no access to stages
    assert request(keyed.stage_ports[0], "POST", "/forward", body, token=ALICE)[0] == 401
    os.kill(keyed.worker_pid("stage-0"), signal.SIGKILL)

    def forwarded():
        return request(keyed.port, "POST", "/stage/0/forward", body, token=keyed.token)

    status, answer = wait_until(lambda: (got := forwarded())[0] != 200 and got, 10, "the stage is missed")
    assert (status, answer["success"]) == (503, False)
    wait_until(lambda: forwarded()[0] == 200, 60, "the stage is back")
    reload = {"reload": True}  # ends the session of these forwards
    assert request(keyed.stage_ports[0], "POST", "/load_model/0", reload, token=keyed.token)[0] == 200


@pytest.mark.model
def test_forwards_by_hand_generate_what_generate_does_on_the_real_model(real_cluster):
    for prompt in PROMPTS[:3]:
        prompt_ids, expected = generated_ids(real_cluster, prompt, 32)
        assert generate_by_hand(stage_paths(real_cluster), "", prompt_ids, 32) == expected
    held = real_cluster.kv_bytes_held()
    assert get_json(f"{real_cluster.url}/health")[1]["status"] == "ready"
    assert held <= 2 * (128 << 20)
    for stage in ("stage-0", "stage-1"):  # ends the sessions of these forwards
        os.kill(real_cluster.worker_pid(stage), signal.SIGKILL)
    wait_until(lambda: not real_cluster.is_ready(), 15, "the stages are missed")
