"""Real files of people, opened as they are: tokens beside llama-server's, and cut in two beside whole.

`llama_server_greedy.json` holds what llama-server (llama-cpp-python 0.3.36) answered: POST /completion with temperature
0, ignore_eos and n_probs 2; `gaps` are the differences of the two best log-probabilities at each token.
"""

import json
from pathlib import Path

import pytest

from tests.support.models.equality import first_difference
from tests.support.models.real_files import GEMMA_3, QWEN_25_CODER, RealFile
from tests.support.processes.cluster import running_cluster

GREEDY = json.loads(Path(__file__).with_name("llama_server_greedy.json").read_text(encoding="utf-8"))
NEW_TOKENS = 24
# Both programs round activations to 8 bits for each product, so each is 0.15 away from float32 (root mean square over
# the 200 best logits), and as far from the other.
ROUNDING_GAP = 0.5
LEAST_EQUAL = 0.5  # share of all tokens before the first difference of their prompt

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[GEMMA_3, QWEN_25_CODER], ids=lambda file: file.name)
def file(request) -> RealFile:
    return request.param


@pytest.fixture(scope="module")
def answers(file, tmp_path_factory):
    """The prompts and tokens of one and of two stages, and what the second kind of cluster left in its cache."""

    def ask(stages):
        folder = tmp_path_factory.mktemp("real")
        as_stored = {"NOODLE_QUALITY": "stored", "NOODLE_CACHE_DIR": str(folder / "cache")}
        with running_cluster(folder / "state", file.path(), stages, **as_stored) as cluster:
            made = [
                cluster.generate(row["text"], max_new_tokens=NEW_TOKENS, ignore_eos=True, details=True)
                for row in GREEDY[file.name]
            ]
            question = {"messages": [{"role": "user", "content": "Write a Python function that adds two numbers."}]}
            chat = cluster.post("/v1/chat/completions", {**question, "max_tokens": 80, "temperature": 0})
        details = [answer["details"] for answer in made]
        return [(each["prompt_token_ids"], [token["id"] for token in each["tokens"]]) for each in details], chat

    return ask(1), ask(2)


def test_a_file_cut_in_two_answers_as_it_does_whole(answers):
    assert answers[0][0] == answers[1][0]


def test_tokens_are_llama_servers_where_rounding_cannot_decide(file, answers):
    equal = 0
    for (prompt_ids, got), expected in zip(answers[1][0], GREEDY[file.name], strict=True):
        assert prompt_ids == expected["prompt_ids"]
        parted_at = first_difference(expected["token_ids"], got)
        equal += NEW_TOKENS if parted_at is None else parted_at
        if parted_at is not None:
            gap = expected["gaps"][parted_at]
            assert gap < ROUNDING_GAP, (
                f"{expected['text']!r}: token {parted_at} differs where the best two are {gap} apart"
            )
    assert equal >= LEAST_EQUAL * NEW_TOKENS * len(GREEDY[file.name])


def test_a_chat_goes_through_the_files_own_template(file, answers):
    status, answer = answers[1][1]
    if file is GEMMA_3:  # a base model, whose file has no template
        assert status == 400
        assert "no chat template" in answer["error"]["message"]
    else:
        assert status == 200
        assert "def add" in answer["choices"][0]["message"]["content"]
