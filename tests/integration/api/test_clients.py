"""What third-party clients expect: error classes, limits by key, ids, and the requests of their tools."""

import json
import os
import signal
import threading

import openai
import pytest

from tests.support.processes.cluster import running_cluster, wait_until

pytestmark = pytest.mark.timeout(300)
ALICE, BOB = "alices-secret", "bobs-secret"
KV_TOKENS = 220  # room of a stage, below the context of 256
CHAT = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def cluster(tiny_folder, tmp_path_factory):
    variables = {
        "NOODLE_API_KEY": f"alice:{ALICE},bob:{BOB}",
        "NOODLE_MAX_REQUESTS_PER_KEY": "1",
        "NOODLE_KV_BYTES": str(KV_TOKENS * 1024),  # 4 layers of 256 bytes a token at most
        "NOODLE_SPLIT": "4,2",
        "NOODLE_RECOVERY_SECONDS": "1",
        "NOODLE_MAX_BODY_BYTES": "100000",
        "NOODLE_LOG_FORMAT": "json",
    }
    with running_cluster(tmp_path_factory.mktemp("clients") / "state", tiny_folder, 2, **variables) as running:
        yield running


@pytest.fixture(scope="module")
def alice(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=ALICE, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def bob(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=BOB, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(alice):
    return alice.models.list().data[0].id


def asked(model, /, **changes):
    return {"model": model, "prompt": "abc", "max_tokens": 5, "extra_body": {"ignore_eos": True}} | changes


@pytest.mark.parametrize(
    ("changes", "kind", "status"),
    [
        ({"temperature": -1}, openai.BadRequestError, 400),
        ({"n": 2}, openai.BadRequestError, 400),
        ({"best_of": 2}, openai.BadRequestError, 400),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, 400),
        ({"prompt": list(range(3, 253)), "max_tokens": 50}, openai.BadRequestError, 400),
        ({"prompt": list(range(3, 260)), "max_tokens": 0, "echo": True}, openai.BadRequestError, 400),
        ({"model": "gpt-4"}, openai.NotFoundError, 404),
        ({"prompt": "a" * 100_000}, openai.APIStatusError, 413),
        ({"max_tokens": KV_TOKENS}, openai.UnprocessableEntityError, 422),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_refused_raises_the_clients_own_class(alice, model, changes, kind, status, stream):
    with pytest.raises(kind) as caught:
        alice.completions.create(**asked(model, **changes), stream=stream)
    assert caught.value.status_code == status
    assert caught.value.body["message"]
    assert caught.value.request_id


def test_a_wrong_key_raises_its_class(cluster, model):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(**asked(model))
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_key_over_its_limit_is_told_to_come_again_and_no_other_is(cluster, alice, bob, model):
    stream = alice.completions.create(**asked(model, max_tokens=200), stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        alice.completions.create(**asked(model))
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert ALICE not in str(caught.value)
    assert bob.completions.create(**asked(model)).usage.completion_tokens == 5
    assert alice.models.list().data  # only generation counts
    stream.close()
    wait_until(lambda: is_free(alice, model), 10, "a stream that was left counts no more")


def is_free(client, model):
    try:
        return client.completions.create(**asked(model))
    except openai.RateLimitError:
        return False


def test_the_cluster_itself_has_no_limit(cluster):
    answers = []

    def ask():
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True}
        answers.append(cluster.post("/v1/completions", body, Authorization=f"Bearer {cluster.token}")[0])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4


def test_keys_are_counted_by_name_and_no_key_stands_in_metrics_or_logs(cluster, alice, model):
    alice.completions.create(**asked(model))
    _, text = cluster.get("/metrics", cluster.token)
    assert b'noodle_requests_total{key="alice",outcome="finished"}' in text
    logs = "".join(path.read_text(encoding="utf-8") for path in cluster.state_dir.rglob("*.log"))
    assert '"message"' in logs
    for secret in (ALICE, BOB, cluster.token):
        assert secret.encode() not in text
        assert secret not in logs


def test_a_request_is_found_in_the_log_by_the_id_that_its_answer_carries(cluster, alice, model):
    answer = alice.completions.with_raw_response.create(**asked(model), extra_headers={"X-Request-Id": "find-me"})
    assert answer.headers["X-Request-Id"] == "find-me"

    def lines():
        log = next(cluster.state_dir.rglob("coordinator.log")).read_text(encoding="utf-8")
        found = [json.loads(line) for line in log.splitlines() if '"find-me' in line]
        return [line["message"] for line in found if "finished after 5 new tokens" in line["message"]]

    (message,) = wait_until(lines, 5, "the log has the request's line")
    assert message.endswith("for alice")


def test_two_requests_with_one_id_do_not_meet(cluster):
    answers = {}

    def ask(index):
        body = {"prompt": f"{index} abc", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
        headers = {"Authorization": f"Bearer {cluster.token}", "X-Request-Id": "the-same"}
        answers[index] = cluster.post("/v1/completions", body, **headers)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(answers)
    for index in range(4):
        ask(index)
    assert answers == together


# as vllm/benchmarks/lib/endpoint_request_func.py sends them
BENCH_COMPLETION = {
    "prompt": "abc",
    "repetition_penalty": 1.0,
    "max_tokens": 8,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}
BENCH_CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
    "max_completion_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BENCH_COMPLETION),
        ("/v1/completions", {**BENCH_COMPLETION, "logprobs": 0, "temperature": 0.0}),
        ("/v1/chat/completions", BENCH_CHAT),
        ("/v1/chat/completions", {**BENCH_CHAT, "temperature": 0.0, "top_p": 1.0}),
    ],
)
def test_the_request_shapes_of_vllm_bench_serve_are_answered_as_it_reads_them(cluster, model, path, body):
    headers = {"Authorization": f"Bearer {BOB}", "x-request-id": "bench-1"}
    status, raw = cluster.post(path, {"model": model, **body}, **headers)
    assert status == 200
    assert b"event: error" not in raw, raw
    texts, used, done = [], None, False
    for line in raw.decode().split("\n"):
        if not line or line.startswith(":"):
            continue
        data = line.removeprefix("data: ")
        done = data == "[DONE]"
        if done:
            break
        chunk = json.loads(data)
        if choices := chunk.get("choices"):
            texts.append(choices[0].get("text") or choices[0].get("delta", {}).get("content"))
        elif usage := chunk.get("usage"):
            used = usage
    assert done
    assert used["completion_tokens"] == 8
    assert any(texts)


def test_an_error_in_the_middle_of_a_stream_raises_in_the_client_and_then_503_does(cluster, alice, model):
    """Runs last: this cluster lets open requests wait for one second only."""
    stream = alice.completions.create(**asked(model, max_tokens=200), stream=True)
    chunks = iter(stream)
    next(chunks)
    frozen = cluster.worker_pid("stage-1")
    os.kill(frozen, signal.SIGSTOP)
    try:
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
        assert not isinstance(caught.value, openai.APIStatusError)
        assert "The pipeline broke" in caught.value.message
        assert caught.value.code == "generation_failed"
        with pytest.raises(openai.InternalServerError) as refused:
            alice.completions.create(**asked(model))
        assert refused.value.status_code == 503
        assert refused.value.response.headers["Retry-After"]
    finally:
        os.kill(frozen, signal.SIGCONT)
    wait_until(lambda: answers_again(alice, model), 60, "the next request works")


def answers_again(client, model):
    try:
        return client.completions.create(**asked(model))
    except openai.APIStatusError:
        return False
