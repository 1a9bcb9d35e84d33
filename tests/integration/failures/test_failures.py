"""When a process dies, no request hangs, no token is lost, and the next request works."""

import http.client
import json
import os
import signal
import socket
import threading
import time

import pytest

from tests.support.models.tiny_model import tiny_llama_folder
from tests.support.processes.cluster import ANSWER_SECONDS, request, running_cluster, wait_until

pytestmark = pytest.mark.timeout(300)
KV_BYTES_PER_TOKEN = 768  # of the tiny model, on a stage with three of its layers
OPEN_REQUEST_SECONDS = 30.0  # three times what an open request may take to end or continue
# of an open request: 200 tokens of the tiny model take less than the 0.25 s after which metrics tell of them
NEW_TOKENS, POSITIONS = 1500, 2048


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """The tiny model with room for long answers."""
    folder = tmp_path_factory.mktemp("long") / "tiny-llama"
    tiny_llama_folder(folder, max_position_embeddings=POSITIONS)
    return folder


@pytest.fixture(scope="module")
def cluster(long_folder, tmp_path_factory):
    state = tmp_path_factory.mktemp("failures") / "state"
    # a fixed split, so that no layers move
    variables = {"NOODLE_STEP_TOKENS": "16", "NOODLE_RECOVERY_SECONDS": "10", "NOODLE_SPLIT": "3,3"}
    with running_cluster(state, long_folder, 2, **variables) as running:
        yield running


class OpenRequests:
    """Requests that run while a process dies."""

    def __init__(self, cluster, count=4, new_tokens=NEW_TOKENS, running=None):
        self.answers = {}
        parameters = {"max_new_tokens": new_tokens, "ignore_eos": True}

        def ask(index):
            body = {"inputs": f"request {index}", "parameters": parameters}
            try:
                self.answers[index] = cluster.post("/generate", body)
            except (OSError, http.client.HTTPException) as error:  # the coordinator itself died
                self.answers[index] = (599, {"error": {"message": repr(error)}})

        self.threads = [threading.Thread(target=ask, args=(index,)) for index in range(count)]
        for thread in self.threads:
            thread.start()
        least = count if running is None else running  # all are admitted: the kill affects each of them
        wait_until(lambda: open_requests(cluster) >= least, 30, "the requests run")

    def ended(self, seconds=OPEN_REQUEST_SECONDS):
        """Return the answers; fail if a request hangs."""
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), "an open request hangs"
        return [self.answers[index] for index in sorted(self.answers)]


def answers_again(cluster):
    def answers():
        return cluster.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}})[0] == 200

    wait_until(answers, 60, "the next request works")


def check_whole_or_told(answers, expected):
    """Check that each request ended with its own tokens, or with an error message."""
    for index, (status, answer) in enumerate(answers):
        if status == 200:
            assert answer["generated_text"] == expected[index]
        else:
            assert status >= 500
            assert answer["error"]["message"]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_ends_no_request_without_a_word_and_comes_back(cluster, stage):
    expected = [
        cluster.generate(f"request {index}", max_new_tokens=NEW_TOKENS, ignore_eos=True)["generated_text"]
        for index in range(4)
    ]
    requests = OpenRequests(cluster)
    os.kill(cluster.worker_pid(f"stage-{stage}"), signal.SIGKILL)
    check_whole_or_told(requests.ended(), expected)
    answers_again(cluster)
    wait_until(lambda: cluster.kv_bytes_held() == 0, 15, "no KV rows are left")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_stops_moving_ends_open_requests_in_time_and_is_named(cluster, stage):
    requests = OpenRequests(cluster)
    frozen = cluster.worker_pid(f"stage-{stage}")
    os.kill(frozen, signal.SIGSTOP)
    try:
        answers = requests.ended()
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert all(status >= 500 for status, _ in answers)
    assert all(f"stage {stage} on " in answer["error"]["message"] for _, answer in answers)
    answers_again(cluster)


def test_a_cut_pipeline_with_little_room_leaves_no_request_without_its_rows(tiny_folder, tmp_path):
    """The running request is cancelled while the pipeline is cut; those that wait for its rows must get them."""
    little_room = {"NOODLE_SPLIT": "3,3", "NOODLE_KV_BYTES": str(220 * KV_BYTES_PER_TOKEN)}  # for one request
    with running_cluster(tmp_path / "state", tiny_folder, 2, **little_room) as cluster:
        asked = {"inputs": "a request", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}
        frozen = cluster.worker_pid("stage-1")
        runs = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=ANSWER_SECONDS)
        runs.request("POST", "/generate_stream", json.dumps(asked), {"Content-Type": "application/json"})
        response = runs.getresponse()
        assert response.status == 200
        response.readline()
        os.kill(frozen, signal.SIGSTOP)
        try:
            requests = OpenRequests(cluster, count=3, new_tokens=200, running=1)
            wait_until(lambda: cluster.get("/health")[1]["status"] != "ready", 15, "the cut is noticed")
            before = open_requests(cluster)
            runs.sock.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: open_requests(cluster) == before - 1, 5, "the request is cancelled")
        finally:
            os.kill(frozen, signal.SIGCONT)
            response.close()
            runs.close()
        assert [status for status, _ in requests.ended()] == [200] * 3


def open_requests(cluster):
    """Return the number of running requests, from the coordinator's metrics."""
    _, text = cluster.get("/metrics", cluster.token)
    line = next(line for line in text.decode().splitlines() if line.startswith("noodle_num_requests_running "))
    return float(line.split()[1])


def test_a_killed_valkey_stops_no_running_request_and_comes_back(cluster):
    requests = OpenRequests(cluster)
    os.kill(cluster.service_pid("valkey"), signal.SIGKILL)
    assert [status for status, _ in requests.ended()] == [200] * 4
    answers_again(cluster)


def test_a_killed_coordinator_comes_back_and_leaves_no_rows(cluster):
    requests = OpenRequests(cluster)
    os.kill(cluster.worker_pid("coordinator"), signal.SIGKILL)
    assert [status for status, _ in requests.ended()] == [599] * 4
    answers_again(cluster)
    wait_until(lambda: cluster.kv_bytes_held() == 0, 15, "no KV rows are left")


@pytest.fixture(scope="module")
def movable(long_folder, tmp_path_factory):
    """A cluster that moves layers away from a stage after three seconds of silence."""
    state = tmp_path_factory.mktemp("movable") / "state"
    with running_cluster(state, long_folder, 2, NOODLE_STAGE_RETURN_SECONDS="3") as running:
        yield running


def layers_of(cluster):
    return {
        stage["stage_id"]: stage["layers"][1] - stage["layers"][0]
        for stage in cluster.get("/health", cluster.token)[1]["stages"]
        if "layers" in stage
    }


def test_a_stage_that_leaves_gives_its_layers_away_and_gets_some_when_it_starts_again(movable):
    port = movable.stage_ports[1]
    wait_until(lambda: request(port, "POST", "/leave", {}, token=movable.token)[1]["layers"] is None, 60, "it has left")
    wait_until(lambda: layers_of(movable) == {0: 6}, 15, "the coordinator computes by that plan")
    answers_again(movable)
    status, answer = request(movable.stage_ports[0], "POST", "/leave", {}, token=movable.token)
    assert status == 409
    assert "is the last one" in answer["error"]["message"]
    os.kill(movable.worker_pid("stage-1"), signal.SIGKILL)
    wait_until(lambda: len(layers_of(movable)) == 2, 90, "the stage that is back gets layers")
    answers_again(movable)


def test_layers_move_away_from_a_stage_that_stays_silent_and_open_requests_go_on(movable):
    expected = [
        movable.generate(f"request {index}", max_new_tokens=NEW_TOKENS, ignore_eos=True)["generated_text"]
        for index in range(4)
    ]
    frozen = movable.worker_pid("stage-1")
    requests = OpenRequests(movable)
    os.kill(frozen, signal.SIGSTOP)
    try:
        answers = requests.ended(60)
        assert layers_of(movable) == {0: 6}
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert [(status, answer.get("generated_text")) for status, answer in answers] == [(200, text) for text in expected]
    wait_until(lambda: len(layers_of(movable)) == 2, 60, "the stage that is back gets layers")
    answers_again(movable)
