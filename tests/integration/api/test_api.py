"""The public routes on a real cluster of two stages."""

import http.client
import json
import threading

import openai
import pytest

from tests.support.processes.cluster import request, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


CHAT = [{"role": "user", "content": "Say hello."}]


def test_the_openai_client_gets_a_chat_answer_with_right_counts(client, model):
    answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=7, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_the_stream_says_what_the_whole_answer_says(client, model):
    asked = {"model": model, "messages": CHAT, "max_completion_tokens": 12, "seed": 5, "temperature": 0.9}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_the_same_seed_gives_the_same_text_and_a_drawn_one_is_returned(client, model):
    first = client.completions.create(model=model, prompt="The sky", max_tokens=12, temperature=1.0)
    again = client.completions.create(
        model=model, prompt="The sky", max_tokens=12, temperature=1.0, seed=first.model_extra["seed"]
    )
    assert first.choices[0].text == again.choices[0].text


def test_list_content_equals_plain_content(client, model):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    answers = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=5, temperature=0)
        for messages in (CHAT, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(cluster):
    free = cluster.generate("abc", max_new_tokens=40, ignore_eos=True)["generated_text"]
    stop = free[10:13]
    cut = cluster.generate("abc", max_new_tokens=40, ignore_eos=True, stop=[stop])
    assert cut["generated_text"] == free[: free.index(stop)]
    assert cut["details"]["finish_reason"] == "stop_sequence"


def test_generate_and_its_stream_agree(cluster):
    whole = cluster.generate("abc", max_new_tokens=9, ignore_eos=True)
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 9, "ignore_eos": True}}
    status, raw = cluster.post("/generate_stream", body)
    assert status == 200
    events = [json.loads(line[5:]) for line in raw.decode().split("\n") if line.startswith("data:")]
    assert [event["index"] for event in events] == list(range(1, 10))
    assert "".join(event["token"]["text"] for event in events) == whole["generated_text"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["generated_tokens"] == 9


def test_requests_at_once_get_what_each_gets_alone(cluster):
    prompts = [f"prompt {'x' * (7 * index)}" for index in range(8)]
    alone = [cluster.generate(prompt, max_new_tokens=20, ignore_eos=True)["generated_text"] for prompt in prompts]
    together: dict[int, str] = {}

    def ask(index):
        together[index] = cluster.generate(prompts[index], max_new_tokens=20, ignore_eos=True)["generated_text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(8)] == alone


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "does not exist"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 1e9}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 2}, openai.BadRequestError, "'n'"),
        ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 1_000_000}, openai.BadRequestError, "context"),
    ],
)
def test_a_wrong_request_is_refused_by_name_in_the_clients_own_class(client, model, call, kind, word):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": model, "messages": CHAT, **call})
    assert word in str(caught.value)


def test_a_prompt_over_the_context_is_told_the_three_numbers(cluster):
    prompt = list(range(3, 203))
    status, answer = cluster.post("/v1/completions", {"prompt": prompt, "max_tokens": 100})
    assert status == 400
    message = answer["error"]["message"]
    assert all(number in message for number in ("256", "200", "100"))
    assert answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("message", [{"role": "user", "content": ""}, {"role": "user", "content": "x" * 9000}])
def test_a_conversation_that_cannot_fit_is_told_the_three_numbers_before_it_is_rendered(cluster, message):
    context = cluster.get("/health")[1]["context_length"]
    messages = [message] * (200_000 if not message["content"] else 500)
    status, answer = cluster.post("/v1/chat/completions", {"messages": messages, "max_tokens": 7})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert f"context is {context} tokens" in answer["error"]["message"]
    assert "at least" in answer["error"]["message"]
    assert "7 more" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/chat/completions", b"{", {}, 400),
        ("/v1/chat/completions", b"[]", {}, 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}]}', {}, 400),
        ("/v1/completions", b'{"prompt": ""}', {}, 400),
        ("/generate", b'{"inputs": ""}', {}, 400),
        ("/generate", b'{"inputs": "a", "parameters": {"max_new_tokens": "many"}}', {}, 400),
        ("/generate", b'{"inputs": "a", "parameters": {"max_new_tokens": NaN}}', {}, 400),
        ("/generate", b'{"inputs": "a"}', {"Content_Type": "text/plain"}, 415),
        ("/generate", b" " * (9 << 20), {}, 413),
        ("/nothing", b"{}", {}, 404),
        ("/health", b"{}", {}, 405),
    ],
)
def test_a_bad_body_gets_openais_error_object_and_nothing_breaks(cluster, path, body, headers, status):
    got, answer = cluster.post(path, body, **headers)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert cluster.generate("a", max_new_tokens=1)["details"]["generated_tokens"] == 1


def test_a_page_that_has_its_name_point_here_is_refused(cluster):
    status, answer = cluster.post("/generate", {"inputs": "a"}, Host="evil.example:80")
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_the_doors_between_machines_are_locked(cluster):
    for port in (*cluster.stage_ports,):
        for method, path in (("POST", "/hop"), ("GET", "/results"), ("GET", "/metrics")):
            for token in ("", "wrong-token-of-some-length"):
                status, _ = request(port, method, path, b"" if method == "POST" else None, token=token)
                assert status == 401
        status, answer = request(port, "GET", "/health")
        assert (status, set(answer)) == (200, {"service", "status"})


def test_a_client_that_goes_away_frees_its_rows(cluster):
    for path in ("/generate_stream", "/generate"):
        connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
        body = json.dumps({"inputs": "abc", "parameters": {"max_new_tokens": 240, "ignore_eos": True}})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        wait_until(lambda: cluster.kv_bytes_held() > 0, 10, "the request runs")
        connection.close()
        wait_until(lambda: cluster.kv_bytes_held() == 0, 10, "its KV rows are free")


def test_metrics_want_the_token_and_count(cluster):
    assert cluster.get("/metrics")[0] == 401
    status, text = cluster.get("/metrics", cluster.token)
    assert status == 200
    assert b"noodle_generation_tokens_total" in text
