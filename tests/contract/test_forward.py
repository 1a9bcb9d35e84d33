"""POST /forward and POST /load_model on real stages: results as from the pipeline, and refusals."""

import json
import threading

import numpy as np
import pytest

from services.stage.manual.format import MAXIMUM_FORWARD_TOKENS
from services.stage.manual.forward import MAXIMUM_WAITING_FORWARDS
from tests.support.clients.forward_by_hand import generate_by_hand
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import request, wait_until
from tests.support.processes.stage_rig import running_stages

pytestmark = pytest.mark.timeout(300)
HIDDEN_SIZE = 64
PROMPT = [5, 17, 42, 99, 7, 7, 201]


@pytest.fixture(scope="module")
def rig(tiny_folder, tmp_path_factory):
    with running_stages(tmp_path_factory.mktemp("rig"), tiny_folder, (3, 2, 1)) as running:
        yield running


@pytest.fixture
def forward(rig):
    def send(stage, body, **headers):
        port = int(rig.urls[stage].rsplit(":", 1)[1])
        return request(port, "POST", "/forward", body, token=rig.token, **headers)

    return send


def computed(answer):
    status, value = answer
    assert status == 200, value
    assert value["success"] is True
    return value["output"]


def refused(answer, status, *words):
    got, value = answer
    assert got == status, value
    assert value["success"] is False
    for word in words:
        assert word in value["error"]["message"]
    return value["error"]


def test_activations_by_hand_give_the_tokens_of_the_unsplit_model(rig, tiny_folder):
    expected = WholeModel(tiny_folder).generate_once(tuple(PROMPT), 20)
    assert generate_by_hand(rig.urls, rig.token, PROMPT, 20) == list(expected)


def test_a_forward_says_where_it_goes_on_and_what_came_out(forward):
    body = {"session_id": "said", "token_ids": PROMPT, "token_index": 0, "stage_id": 0}
    status, answer = forward(0, body)
    assert status == 200
    assert (answer["session_id"], answer["stage_id"], answer["next_token_index"]) == ("said", 0, len(PROMPT))
    assert answer["output"]["shape"] == [len(PROMPT), HIDDEN_SIZE]
    assert np.shape(answer["output"]["activations"]) == (len(PROMPT), HIDDEN_SIZE)


@pytest.mark.parametrize("shape", [(HIDDEN_SIZE,), (4, HIDDEN_SIZE), (1, 4, HIDDEN_SIZE)])
def test_activations_come_back_in_the_shape_they_came_in(forward, shape):
    sent = np.random.default_rng(3).normal(size=shape)
    for stage in (0, 1):
        output = computed(forward(stage, {"session_id": f"shape {shape}", "activations": sent.tolist()}))
        assert output["shape"] == list(shape) == list(np.shape(output["activations"]))
    assert computed(forward(2, {"session_id": "last", "activations": sent.tolist()}))["shape"] == [1]


def test_the_guides_three_numbers_are_told_the_hidden_size(forward):
    body = {"session_id": "guide", "activations": [0.1, 0.2, 0.3], "token_index": 0, "stage_id": 0}
    error = refused(forward(0, body), 422, "3 numbers", "64")
    assert error["param"] == "activations"


def test_a_gap_is_told_the_position_that_is_expected(forward):
    computed(forward(0, {"session_id": "gap", "token_ids": [5, 6, 7]}))
    refused(forward(0, {"session_id": "gap", "token_ids": [8], "token_index": 5}), 409, "token_index 3 is expected")
    status, answer = forward(0, {"session_id": "gap", "token_ids": [8]})
    assert (status, answer["next_token_index"]) == (200, 4)
    refused(forward(0, {"session_id": "never seen", "token_ids": [8], "token_index": 1}), 409, "token_index 0")


def test_a_token_computed_again_replaces_what_came_after_it(forward):
    long, short = {"session_id": "long"}, {"session_id": "short"}
    computed(forward(0, {**long, "token_ids": [9, 8, 7, 6, 5, 4]}))
    again = computed(forward(0, {**long, "token_ids": [50, 60], "token_index": 3}))
    computed(forward(0, {**short, "token_ids": [9, 8, 7]}))
    straight = computed(forward(0, {**short, "token_ids": [50, 60]}))
    assert again["activations"] == pytest.approx(np.array(straight["activations"]), abs=1e-5)
    refused(forward(0, {**long, "token_ids": [1], "token_index": 6}), 409, "token_index 5 is expected")


def test_ending_a_session_frees_its_rows_at_once(rig, forward):
    for stage in range(3):
        before = rig.states()[stage]["kv_bytes_held"]
        body = {"session_id": "ended", "activations": [[0.1] * HIDDEN_SIZE] * 5}
        computed(forward(stage, body))
        assert rig.states()[stage]["kv_bytes_held"] > before
        assert computed(forward(stage, {"session_id": "ended", "end": True})) == {}
        assert rig.states()[stage]["kv_bytes_held"] == before
        computed(forward(stage, {**body, "end": True}))
        assert rig.states()[stage]["kv_bytes_held"] == before
    refused(forward(0, {"session_id": "ended", "token_ids": [4], "token_index": 5}), 409)


def test_logits_are_those_that_chose_the_token(forward):
    body = {"session_id": "logits", "activations": [0.5] * HIDDEN_SIZE, "logits": True}
    output = computed(forward(2, body))
    assert int(np.argmax(output["logits"])) == output["token_ids"][0]
    assert len(output["logits"]) == 300
    refused(forward(1, body), 400, "last stage")


def test_many_sessions_displace_the_oldest_and_hold_no_more(rig, forward):
    for number in range(40):
        computed(forward(1, {"session_id": f"one of many {number}", "activations": [0.1] * HIDDEN_SIZE}))
    refused(forward(1, {"session_id": "one of many 0", "activations": [0.1] * HIDDEN_SIZE, "token_index": 1}), 409)
    computed(forward(1, {"session_id": "one of many 39", "activations": [0.1] * HIDDEN_SIZE, "token_index": 1}))
    assert rig.states()[1]["kv_bytes_held"] <= 16 * 64 * rig.states()[1]["kv_bytes_per_token"]


GOOD = [0.1] * HIDDEN_SIZE


@pytest.mark.parametrize(
    ("stage", "body", "status", "word"),
    [
        (1, {"session_id": "x", "token_ids": [5]}, 422, "not the first"),
        (0, {"session_id": "x", "token_ids": [300]}, 422, "299"),
        (0, {"session_id": "x", "token_ids": [-1]}, 422, "299"),
        (0, {"session_id": "x", "token_ids": [1 << 60]}, 422, "299"),
        (0, {"session_id": "x", "token_ids": []}, 422, "0 tokens"),
        (0, {"session_id": "x", "token_ids": [[1], [2]]}, 422, "shape"),
        (0, {"session_id": "x", "token_ids": [True]}, 400, "token_ids"),
        (0, {"session_id": "x", "token_ids": [1.5]}, 400, "token_ids"),
        (0, {"session_id": "x", "token_ids": "5"}, 400, "token_ids"),
        (0, {"session_id": "x", "token_ids": [5] * (MAXIMUM_FORWARD_TOKENS + 1)}, 422, "512"),
        (0, {"session_id": "x", "token_ids": [5] * 257}, 400, "256"),
        (0, {"session_id": "x", "token_ids": [5], "activations": GOOD}, 400, "Both"),
        (0, {"session_id": "x"}, 400, "nothing to compute"),
        (0, {"session_id": "x", "activations": None}, 400, "nothing to compute"),
        (0, {"session_id": "", "token_ids": [5]}, 400, "session_id"),
        (0, {"session_id": "x" * 65, "token_ids": [5]}, 400, "session_id"),
        (0, {"token_ids": [5]}, 400, "session_id"),
        (0, {"session_id": "x", "token_ids": [5], "token_index": -1}, 400, "token_index"),
        (0, {"session_id": "x", "token_ids": [5], "token_index": "0"}, 400, "token_index"),
        (0, {"session_id": "x", "token_ids": [5], "stage_id": 1}, 404, "stage 0"),
        (0, {"session_id": "x", "token_ids": [5], "temperature": 1}, 400, "temperature"),
        (1, {"session_id": "x", "activations": []}, 422, "64"),
        (1, {"session_id": "x", "activations": [[]]}, 422, "64"),
        (1, {"session_id": "x", "activations": [GOOD, [1.0]]}, 422, "1 numbers"),
        (1, {"session_id": "x", "activations": [[GOOD], [GOOD]]}, 422, "batch of 2"),
        (1, {"session_id": "x", "activations": [[[GOOD]]]}, 400, "nested"),
        (1, {"session_id": "x", "activations": [True, *GOOD[1:]]}, 400, "activations"),
        (1, {"session_id": "x", "activations": ["1", *GOOD[1:]]}, 400, "activations"),
        (1, {"session_id": "x", "activations": {"data": 1}}, 400, "activations"),
        (1, {"session_id": "x", "activations": [1e39, *GOOD[1:]]}, 422, "infinite"),
        (1, {"session_id": "x", "activations": [GOOD] * (MAXIMUM_FORWARD_TOKENS + 1)}, 422, "512"),
        (1, b"{", 400, "body"),
        (1, b"[]", 400, "object"),
        (1, b'{"session_id": "x", "activations": [NaN]}', 400, "body"),
        (1, b'{"session_id": "\xff"}', 400, ""),
        (1, b"[" * 100_000, 400, ""),
        (1, b" " * (9 << 20), 413, "8388608"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name_and_keeps_nothing(rig, forward, stage, body, status, word):
    before = rig.states()[stage]["kv_bytes_held"]
    refused(forward(stage, body), status, word)
    assert rig.states()[stage]["kv_bytes_held"] <= before


@pytest.mark.parametrize("content_type", ["application/octet-stream", "text/plain", ""])
def test_a_body_that_is_not_declared_as_json_is_refused_with_the_cure(forward, content_type):
    body = json.dumps({"session_id": "x", "activations": GOOD}).encode()
    refused(forward(1, body, Content_Type=content_type), 415, "Content-Type: application/json")


def test_an_anonymous_client_computes_nothing_and_loads_nothing(rig):
    port = int(rig.urls[0].rsplit(":", 1)[1])
    for path in ("/forward", "/load_model/0"):
        for token in ("", "wrong-token-of-some-length"):
            status, answer = request(port, "POST", path, {"session_id": "x", "token_ids": [5]}, token=token)
            assert (status, answer["success"]) == (401, False)


def test_forwards_at_once_are_all_answered_or_told_to_wait(forward):
    statuses = []

    def send(number):
        body = {"session_id": f"at once {number}", "token_ids": [5] * 200}
        statuses.append(forward(0, body)[0])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4 * MAXIMUM_WAITING_FORWARDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= MAXIMUM_WAITING_FORWARDS


def test_loading_by_hand_says_what_is_loaded_and_refuses_other_layers(rig):
    def load(stage, path_id, body=None):
        port = int(rig.urls[stage].rsplit(":", 1)[1])
        return request(port, "POST", f"/load_model/{path_id}", body, token=rig.token)

    status, answer = load(1, 1)
    assert status == 200, answer
    assert (answer["success"], answer["stage_id"], answer["layers"]) == (True, 1, [3, 5])
    assert load(1, 1, {"start_layer": 3, "end_layer": 5})[0] == 200
    refused(load(1, 1, {"start_layer": 0, "end_layer": 5}), 409, "[3, 5)")
    refused(load(1, 0), 404, "stage 1")
    refused(load(1, "first"), 404, "stage 1")
    refused(load(1, 1, {"start_layer": "3"}), 400)
    refused(load(1, 1, b"{"), 400)


def test_loading_again_starts_every_session_again(rig, forward):
    computed(forward(1, {"session_id": "before", "activations": GOOD}))
    port = int(rig.urls[1].rsplit(":", 1)[1])
    status, answer = request(port, "POST", "/load_model/1", {"reload": True}, token=rig.token)
    assert status == 200, answer
    refused(forward(1, {"session_id": "before", "activations": GOOD, "token_index": 1}), 409)
    wait_until(lambda: rig.states()[1]["phase"] == "ready", 10, "stage 1 is ready")
    assert rig.states()[1]["kv_bytes_held"] == 0
