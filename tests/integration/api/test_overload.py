"""Too many requests, crowds of readers, a model that overflows: every request ends with an answer."""

import http.client
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import safetensors.numpy

from services.stage.worker.sessions import UNLISTED_SECONDS
from tests.measure.endurance.pressure import OVERLOAD_NEW_TOKENS, overload
from tests.support.clients.event_reader import EventReader
from tests.support.models.tiny_model import tiny_llama_folder
from tests.support.processes.cluster import request, running_cluster, wait_until
from tests.support.stages.executors import EXECUTORS, exactly

pytestmark = pytest.mark.timeout(300)
OPEN, WAITING = 4, 8
POISON = 150  # the token whose embedding is NaN


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """A cluster with low limits for requests."""
    state = tmp_path_factory.mktemp("small") / "state"
    limits = {"NOODLE_MAX_OPEN_REQUESTS": str(OPEN), "NOODLE_MAX_WAITING_REQUESTS": str(WAITING)}
    with running_cluster(state, tiny_folder, 2, **limits) as running:
        yield running


@pytest.fixture(scope="module", params=EXECUTORS)
def poisoned(request, tmp_path_factory):
    """A cluster whose model computes NaN once it reads a certain token."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    tiny_llama_folder(folder)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    state = tmp_path_factory.mktemp("poisoned-state") / "state"
    with running_cluster(state, folder, 2, **exactly(request.param)) as running:
        yield running


def body(prompt, new_tokens=200, **parameters):
    return {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True, **parameters}}


def test_of_many_requests_at_once_each_is_served_or_told_when_to_come_again(small):
    ended, health = overload(small, 100)
    assert {each.status for each in ended} == {200, 429}
    served = [each for each in ended if each.status == 200]
    assert len(served) >= OPEN + WAITING
    assert all(each.new_tokens == OVERLOAD_NEW_TOKENS for each in served)
    assert all(each.retry_after.isdecimal() for each in ended if each.status == 429)
    assert max(health, default=0.0) < 10
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")


def test_a_crowd_of_readers_leaves_a_place_for_everybody_else(small):
    threads = OPEN + WAITING + 32  # as services/coordinator/app.py computes them
    statuses, crowd = [], []
    everybody = threading.Event()

    def read():
        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=60)
        connection.request("GET", "/v1/requests/crowd/events")
        response = connection.getresponse()
        statuses.append((response.status, response.getheader("Retry-After")))
        everybody.wait(60)
        connection.close()

    with EventReader(small.port, "POST", "/generate_stream", body("c", 240, resume_seconds=30), X_Request_Id="crowd"):
        crowd = [threading.Thread(target=read) for _ in range(2 * threads)]
        for thread in crowd:
            thread.start()
        wait_until(lambda: len(statuses) == len(crowd), 60, "all are answered")
        assert request(small.port, "GET", "/health")[0] == 200
        assert request(small.port, "DELETE", "/v1/requests/crowd")[0] == 200
    everybody.set()
    for thread in crowd:
        thread.join()
    assert {status for status, _ in statuses} <= {200, 429}
    assert all(retry_after for status, retry_after in statuses if status == 429)
    assert small.generate("after it", max_new_tokens=3)["details"]["generated_tokens"]
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")


def test_a_request_whose_numbers_overflow_fails_with_that_word_and_harms_nobody_beside_it(poisoned):
    well = poisoned.generate([5, 6, 7], max_new_tokens=100, ignore_eos=True)["generated_text"]
    beside = []
    thread = threading.Thread(
        target=lambda: beside.append(poisoned.generate([5, 6, 7], max_new_tokens=100, ignore_eos=True))
    )
    thread.start()
    for number in range(5):
        status, answer = poisoned.post("/generate", body([9, number, POISON, 7]))
        assert status == 500
        assert "not finite numbers (NaN or infinite)" in answer["error"]["message"]
    with EventReader(poisoned.port, "POST", "/generate_stream", body([9, POISON])) as reader:
        assert "NaN" in list(reader)[-1][1]["error"]["message"]
    thread.join()
    assert beside[0]["generated_text"] == well
    wait_until(lambda: poisoned.kv_bytes_held() == 0, 15, "its rows are dropped")


def test_however_often_a_request_is_deleted_it_ends_once_and_frees_its_rows(small):
    with EventReader(
        small.port, "POST", "/generate_stream", body("d", resume_seconds=30), X_Request_Id="deleted"
    ) as reader:
        reader.take(2)
        statuses = []
        threads = [
            threading.Thread(target=lambda: statuses.append(request(small.port, "DELETE", "/v1/requests/deleted")[0]))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 10
        assert "cancelled" in list(reader)[-1][1]["error"]["message"]
    assert request(small.port, "GET", "/v1/requests/deleted")[1]["status"] == "failed"
    assert request(small.port, "DELETE", "/v1/requests/never-seen")[0] == 404
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "its rows are free")


def test_a_request_that_nobody_takes_up_in_its_time_is_freed_on_every_stage(small):
    with EventReader(
        small.port, "POST", "/generate_stream", body("left", 240, resume_seconds=0.2), X_Request_Id="left"
    ) as reader:
        reader.take(1)
    left_at = time.monotonic()
    wait_until(lambda: request(small.port, "GET", "/v1/requests/left")[1]["status"] != "running", 15, "it has ended")
    assert time.monotonic() - left_at < 10
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "its rows are free")


def test_a_stage_that_stood_still_keeps_the_rows_that_the_coordinator_counts_on(small):
    small.generate("rows that are kept", max_new_tokens=20, ignore_eos=True)
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "all but kept rows are freed")
    stage = small.worker_pid("stage-1")
    os.kill(stage, signal.SIGSTOP)
    time.sleep(UNLISTED_SECONDS + 1)  # longer than a session may stay unlisted
    os.kill(stage, signal.SIGCONT)
    wait_until(small.is_ready, 30, "it is whole again")
    time.sleep(1.0)  # two lists of sessions
    assert small.kv_bytes_held() == 0


def test_a_request_over_the_limits_is_refused_with_the_code_of_the_openai_api(small):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(small.post("/generate", body("at once", 100))))
        for _ in range(OPEN + WAITING + 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted({status for status, _ in answers}) == [200, 429]
    assert {answer["error"]["code"] for status, answer in answers if status == 429} == {"rate_limit_exceeded"}
    wait_until(lambda: small.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")


@pytest.mark.parametrize(
    "value", ["0", "-0.0", "-1", "NaN", "Infinity", "1e400", "86401", "1" * 60, '"5"', "true", "[]"]
)
def test_a_time_that_is_none_is_refused(small, value):
    raw = json.dumps(body("a", 3)).replace('"max_new_tokens": 3', f'"max_new_tokens": 3, "timeout_seconds": {value}')
    status, answer = small.post("/generate", raw.encode())
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
