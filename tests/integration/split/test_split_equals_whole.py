"""The central claim: on the real model, through the whole system, the split changes nothing (design D3)."""

import pytest

from tests.support.models.equality import assert_equal_or_tied
from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_file, real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import running_cluster

NEW_TOKENS = 64
PROMPTS_IN_CI = PROMPTS[::4]  # 5 of the 20; `make measure` has all of them

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole():
    return WholeModel(real_model_folder())


@pytest.fixture(scope="module")
def drawn_texts():
    """Texts with temperature and seed; each number of stages and executor adds its own."""
    return set()


@pytest.mark.parametrize("stages", [1, 3])
def test_greedy_tokens_equal_those_of_the_unsplit_model(stages, whole, drawn_texts, tmp_path):
    with running_cluster(tmp_path / "state", real_model_file(), stages) as cluster:
        check_that_the_split_changes_nothing(cluster, whole, drawn_texts)


def test_greedy_tokens_by_transformers_equal_those_of_the_unsplit_model(real_transformers_cluster, whole, drawn_texts):
    check_that_the_split_changes_nothing(real_transformers_cluster, whole, drawn_texts)


def check_that_the_split_changes_nothing(cluster, whole, drawn_texts):
    tied = 0
    for prompt in PROMPTS_IN_CI:
        answer = cluster.generate(prompt, max_new_tokens=NEW_TOKENS, details=True)
        token_ids = [token["id"] for token in answer["details"]["tokens"]]
        prompt_ids = answer["details"]["prompt_token_ids"]
        assert answer["details"]["prompt_tokens"] == len(prompt_ids)
        tied += assert_equal_or_tied(whole, prompt_ids, token_ids, NEW_TOKENS)
    assert tied <= 1
    drawn_texts.add(
        tuple(
            cluster.generate(prompt, max_new_tokens=32, temperature=0.8, top_p=0.95, seed=1234)["generated_text"]
            for prompt in PROMPTS_IN_CI[:3]
        )
    )
    assert len(drawn_texts) == 1
