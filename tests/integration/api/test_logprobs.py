"""Log-probabilities through the whole system equal those of the unsplit model, with chunked prompts and replays."""

import json
import os
import random
import signal
import threading

import openai
import pytest

from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import running_cluster, wait_until

pytestmark = pytest.mark.timeout(600)
TOLERANCE = 1e-3
STEP_TOKENS = 8
UNSHOWN = ("bytes:", "token_id:", "<")  # tokens without characters in the text
# as lm-eval's local-completions requests the log-likelihood of a prompt's tokens
LOGLIKELIHOOD = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@pytest.fixture(scope="module")
def whole(tiny_folder):
    return WholeModel(tiny_folder)


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    """Two stages with small steps, so that a prompt is computed in many chunks."""
    state = tmp_path_factory.mktemp("logprobs") / "state"
    variables = {"NOODLE_STEP_TOKENS": str(STEP_TOKENS), "NOODLE_RECOVERY_SECONDS": "90"}
    with running_cluster(state, tiny_folder, 2, **variables) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def a_prompt(length, seed=0):
    return random.Random(seed).choices(range(3, 290), k=length)


def check_scores(logprobs, prompt, expected, *, top=1):
    """Compare a choice's logprobs with the whole model's table [tokens, vocabulary]; one generated token follows."""
    got = logprobs["token_logprobs"]
    assert len(got) == len(prompt) + 1
    assert [got[0], logprobs["top_logprobs"][0]] == [None, None]
    for place in range(1, len(prompt)):
        assert got[place] == pytest.approx(float(expected[place - 1, prompt[place]]), abs=TOLERANCE)
        named = logprobs["top_logprobs"][place]
        best = float(expected[place - 1].max())
        assert max(named.values()) == pytest.approx(best, abs=TOLERANCE)
        assert got[place] in named.values()
        assert len(named) <= top + 1
    assert got[-1] == pytest.approx(float(expected[-1].max()), abs=TOLERANCE)  # temperature 0


@pytest.mark.parametrize("length", [1, 2, STEP_TOKENS, STEP_TOKENS + 1, 3 * STEP_TOKENS, 100])
def test_scores_of_a_chunked_prompt_are_the_whole_models_across_chunk_borders(cluster, whole, length):
    prompt = a_prompt(length)
    status, answer = cluster.post("/v1/completions", {"prompt": [prompt], **LOGLIKELIHOOD})
    assert status == 200, answer
    check_scores(answer["choices"][0]["logprobs"], prompt, whole.log_probabilities(prompt))


def test_many_prompts_at_once_get_their_own_scores(cluster, whole):
    prompts = [a_prompt(10 + 7 * index, index) for index in range(8)]
    answers = {}

    def ask(index):
        answers[index] = cluster.post("/v1/completions", {"prompt": prompts[index], **LOGLIKELIHOOD})

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        status, answer = answers[index]
        assert status == 200, answer
        check_scores(answer["choices"][0]["logprobs"], prompt, whole.log_probabilities(prompt))


@pytest.mark.parametrize("stage", [0, 1])
def test_scores_come_out_right_after_a_stage_died_in_the_middle_of_the_prompt(cluster, whole, stage):
    prompt, ended = a_prompt(250, 5), {}

    def ask():
        ended["answer"] = cluster.post("/v1/completions", {"prompt": prompt, **LOGLIKELIHOOD, "logprobs": 20})

    replays = replay_count(cluster)
    thread = threading.Thread(target=ask)
    frozen = cluster.worker_pid(f"stage-{stage}")
    os.kill(frozen, signal.SIGSTOP)  # so that the prompt is under way, not finished, when the stage dies
    try:
        thread.start()
        wait_until(lambda: running_requests(cluster) == 1, 10, "the request runs")
    finally:
        os.kill(frozen, signal.SIGKILL)
    thread.join(120)
    status, answer = ended["answer"]
    assert status == 200, answer
    assert replay_count(cluster) > replays
    check_scores(answer["choices"][0]["logprobs"], prompt, whole.log_probabilities(prompt), top=20)


def replay_count(cluster):
    return metric(cluster, 'noodle_session_replays_total{reason="stage_restarted"}')


def running_requests(cluster):
    return metric(cluster, "noodle_num_requests_running")


def metric(cluster, name):
    _, text = cluster.get("/metrics", cluster.token)
    lines = [line for line in text.decode().splitlines() if line.startswith(name + " ")]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


def test_an_echoed_prompt_stands_before_the_answer_and_offsets_point_into_it(client, cluster):
    model = client.models.list().data[0].id
    asked = {
        "model": model,
        "prompt": "the cat é",
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True, logprobs=3)
    choice = echoed.choices[0]
    assert choice.text == "the cat é" + plain.choices[0].text
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == echoed.usage.total_tokens
    assert "bytes:\\xc3" in logprobs.tokens
    before = ""
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        # this model is random: text after an incomplete character begins behind its U+FFFD
        if not token.startswith(UNSHOWN) and not before.startswith(UNSHOWN):
            assert choice.text.startswith(token, offset)
        before = token


def test_no_new_token_at_all_gives_the_prompt_back_with_its_scores(cluster, whole):
    prompt = a_prompt(20)
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    status, answer = cluster.post("/v1/completions", body)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 0, "total_tokens": 20}
    assert choice["finish_reason"] == "length"
    expected = whole.log_probabilities(prompt)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        [float(expected[place - 1, prompt[place]]) for place in range(1, 20)], abs=TOLERANCE
    )
    assert all(len(named) == 1 for named in choice["logprobs"]["top_logprobs"][1:])
    status, answer = cluster.post("/v1/completions", {"prompt": "the cat", "max_tokens": 0, "echo": True})
    assert (status, answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == (200, "the cat", None)
    wait_until(lambda: cluster.kv_bytes_held() == 0, 10, "its rows are free")


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_the_stream_carries_the_scores_of_the_whole_answer(cluster, new_tokens):
    body = {"prompt": "the cat sat é", "max_tokens": new_tokens, "echo": True, "logprobs": 2, "seed": 3}
    body["ignore_eos"] = True
    _, whole_answer = cluster.post("/v1/completions", body)
    _, raw = cluster.post("/v1/completions", {**body, "stream": True})
    chunks = [json.loads(line[5:]) for line in raw.decode().split("\n") if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    expected = whole_answer["choices"][0]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    for name, values in expected["logprobs"].items():
        joined = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"][name]]
        if name.endswith("logprobs"):
            assert len(joined) == len(values)
        else:
            assert joined == values


def test_a_chats_tokens_have_their_scores_bytes_and_neighbours(client, whole):
    model = client.models.list().data[0].id
    asked = {"model": model, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=5, extra_body={"ignore_eos": True})
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 5
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.bytes == token.top_logprobs[0].bytes
    chunks = client.chat.completions.create(
        **asked, logprobs=True, top_logprobs=5, stream=True, extra_body={"ignore_eos": True}
    )
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [len(token.top_logprobs) for token in streamed] == [5] * 8
    alone = client.chat.completions.create(**asked, logprobs=True, extra_body={"ignore_eos": True})
    assert [token.top_logprobs for token in alone.choices[0].logprobs.content] == [[]] * 8


def test_generate_gives_details_of_each_token_and_of_the_prompt(cluster, whole):
    prompt = a_prompt(30, 2)
    answer = cluster.generate(
        prompt, max_new_tokens=4, ignore_eos=True, details=True, decoder_input_details=True, top_n_tokens=3
    )
    details = answer["details"]
    expected = whole.log_probabilities(prompt)
    assert [token["id"] for token in details["prefill"]] == prompt
    assert details["prefill"][0]["logprob"] is None
    assert [token["logprob"] for token in details["prefill"][1:]] == pytest.approx(
        [float(expected[place - 1, prompt[place]]) for place in range(1, 30)], abs=TOLERANCE
    )
    assert [len(tokens) for tokens in details["top_tokens"]] == [3] * 4
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert (top[0]["id"], top[0]["logprob"]) == (token["id"], token["logprob"])
        assert set(top[0]) == {"id", "text", "logprob", "special"}


@pytest.mark.model
def test_the_real_models_log_likelihoods_over_two_stages_are_transformers(real_cluster):
    check_log_likelihoods_of_the_real_model(real_cluster)


@pytest.mark.model
@pytest.mark.full
def test_the_real_models_log_likelihoods_are_transformers_with_small_steps_too(tmp_path):
    with running_cluster(tmp_path / "state", real_model_folder(), 2, NOODLE_STEP_TOKENS="16") as cluster:
        check_log_likelihoods_of_the_real_model(cluster)


def check_log_likelihoods_of_the_real_model(cluster):
    whole = WholeModel(real_model_folder())
    for text in PROMPTS[::4]:
        prompt = whole.tokenizer(text)["input_ids"]
        status, answer = cluster.post("/v1/completions", {"prompt": prompt, **LOGLIKELIHOOD})
        assert status == 200, answer
        check_scores(answer["choices"][0]["logprobs"], prompt, whole.log_probabilities(prompt))
