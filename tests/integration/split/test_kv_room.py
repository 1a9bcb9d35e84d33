"""Many requests with little room for KV rows, and prompts with a shared prefix, get the same tokens as alone."""

import subprocess
import sys
import threading

import pytest

from tests.support.processes.cluster import running_cluster, wait_until
from tests.support.stages.executors import EXECUTORS, exactly

pytestmark = pytest.mark.timeout(300)
KV_BYTES_PER_TOKEN = 768  # of the tiny model, on a stage with three of its layers
ROOM_TOKENS = 150
REQUESTS = 12
NEW_TOKENS = 60
PROMPT = "What a long beginning this is, which all of them share: "


@pytest.fixture(scope="module", params=EXECUTORS)
def pair(request, tiny_folder, tmp_path_factory):
    """Two stages with enough room."""
    if request.param == "transformers":
        yield request.getfixturevalue("cluster")
        return
    with running_cluster(tmp_path_factory.mktemp("pair") / "state", tiny_folder, 2, **exactly("ggml")) as running:
        yield running


@pytest.fixture(scope="module", params=EXECUTORS)
def narrow(request, tiny_folder, tmp_path_factory):
    """A cluster with room for about two of the requests below."""
    state = tmp_path_factory.mktemp("narrow") / "state"
    room = {**exactly(request.param), "NOODLE_KV_BYTES": str(ROOM_TOKENS * KV_BYTES_PER_TOKEN), "NOODLE_SPLIT": "3,3"}
    with running_cluster(state, tiny_folder, 2, **room) as running:
        yield running


def ask(cluster, prompt, new_tokens=NEW_TOKENS):
    return cluster.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)["generated_text"]


def prompt_of(index):
    return f"{index} is the number of this request"


def test_with_room_for_two_all_of_many_requests_get_the_tokens_that_they_get_alone(narrow):
    alone = [ask(narrow, prompt_of(index)) for index in range(REQUESTS)]
    together = {}
    threads = [
        threading.Thread(target=lambda index=index: together.update({index: ask(narrow, prompt_of(index))}))
        for index in range(REQUESTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request hangs"
    assert [together[index] for index in range(REQUESTS)] == alone
    assert narrow.metric(narrow.port, "noodle_preemptions_total") > 0
    wait_until(lambda: narrow.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers(narrow):
    status, answer = narrow.post(
        "/generate", {"inputs": "abc", "parameters": {"max_new_tokens": ROOM_TOKENS + 1, "ignore_eos": True}}
    )
    assert status == 422
    assert str(ROOM_TOKENS) in answer["error"]["message"]


def test_room_for_less_than_the_context_is_reported(narrow):
    (warning,) = narrow.get("/health")[1]["warnings"]
    assert f"{ROOM_TOKENS} tokens, less than the context of 256" in warning
    command = [sys.executable, "-m", "services.cli", "status"]
    status = subprocess.run(command, env=narrow.environment, capture_output=True, text=True, check=True)
    assert f"Note: {warning}" in status.stdout
    new_tokens = ROOM_TOKENS - 20
    asked = {"max_new_tokens": new_tokens, "ignore_eos": True}
    assert narrow.generate([5] * 20, **asked)["details"]["generated_tokens"] == new_tokens
    assert narrow.post("/generate", {"inputs": [5] * 21, "parameters": asked})[0] == 422


def test_a_prompt_that_begins_like_one_before_gets_the_same_tokens_for_less(pair):
    first = ask(pair, PROMPT)
    hits = pair.metric(pair.port, "noodle_prefix_cache_hits_total")
    assert ask(pair, PROMPT) == first
    wait_until(lambda: pair.metric(pair.port, "noodle_prefix_cache_hits_total") > hits + 16, 5, "rows were copied")
    turn = ask(pair, PROMPT + first + " And then?")
    wait_until(lambda: pair.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")
    with_stream = pair.generate(PROMPT + first + " And then?", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert with_stream["generated_text"] == turn


def test_rows_are_given_up_for_a_request_that_needs_their_room(narrow):
    for index in range(5):
        ask(narrow, f"{index} is another one, of which the rows are kept", 40)
    assert ask(narrow, "0 a", ROOM_TOKENS - 20)
    wait_until(lambda: narrow.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")
