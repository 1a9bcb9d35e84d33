"""Real files of people, opened as they are: tokens beside llama-server's, and cut in two beside whole.

`llama_server_greedy.json` holds what llama-server (llama-cpp-python 0.3.36) answered: POST /completion with temperature
0 and ignore_eos.
"""

import json
from pathlib import Path

import pytest

from tests.support.models.real_files import GEMMA_3, QWEN_25_CODER, RealFile
from tests.support.processes.cluster import running_cluster

GREEDY = json.loads(Path(__file__).with_name("llama_server_greedy.json").read_text(encoding="utf-8"))
NEW_TOKENS = 24
# Both programs round activations to 8 bits for each product: each is 0.15 away from float32 (root mean square over the
# 200 best log-probabilities), and as far from the other. So where both know the same tokens before, nearly all choices
# are the same (94 and 97 % were), and their own texts part at some point.
LEAST_AGREED = 0.9

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[GEMMA_3, QWEN_25_CODER], ids=lambda file: file.name)
def file(request) -> RealFile:
    return request.param


@pytest.fixture(scope="module")
def answers(file, tmp_path_factory):
    """The prompts and tokens of one and of two stages, with their agreement and a chat."""
    folder = tmp_path_factory.mktemp("real")

    def ask(stages):
        as_stored = {"NOODLE_QUALITY": "stored", "NOODLE_CACHE_DIR": str(folder / "cache")}
        with running_cluster(folder / f"state-{stages}", file.path(), stages, **as_stored) as cluster:
            made = [
                cluster.generate(row["text"], max_new_tokens=NEW_TOKENS, ignore_eos=True, details=True)
                for row in GREEDY[file.name]
            ]
            agreed = [agreement(cluster, row) for row in GREEDY[file.name]] if stages == 2 else []
            question = {"messages": [{"role": "user", "content": "Write a Python function that adds two numbers."}]}
            chat = cluster.post("/v1/chat/completions", {**question, "max_tokens": 80, "temperature": 0})
        details = [answer["details"] for answer in made]
        return [(each["prompt_token_ids"], [token["id"] for token in each["tokens"]]) for each in details], agreed, chat

    return ask(1), ask(2)


def test_a_file_cut_in_two_answers_as_it_does_whole(answers):
    assert answers[0][0] == answers[1][0]


def agreement(cluster, row) -> int:
    """Return at how many of llama-server's tokens the most likely one is the same, given those before it."""
    known = row["prompt_ids"] + row["token_ids"]
    body = {"prompt": known, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    status, answer = cluster.post("/v1/completions", body)
    assert status == 200, answer
    scores = answer["choices"][0]["logprobs"]
    best = [max(each.values()) for each in scores["top_logprobs"][-NEW_TOKENS:]]
    return sum(own >= top for own, top in zip(scores["token_logprobs"][-NEW_TOKENS:], best, strict=True))


def test_prompts_have_llama_servers_ids_and_most_likely_tokens(file, answers):
    expected = GREEDY[file.name]
    assert [prompt_ids for prompt_ids, _ in answers[1][0]] == [row["prompt_ids"] for row in expected]
    assert sum(answers[1][1]) >= LEAST_AGREED * NEW_TOKENS * len(expected)


def test_a_chat_goes_through_the_files_own_template(file, answers):
    status, answer = answers[1][2]
    if file is GEMMA_3:  # a base model, whose file has no template
        assert status == 400
        assert "no chat template" in answer["error"]["message"]
    else:
        assert status == 200
        assert "def add" in answer["choices"][0]["message"]["content"]
