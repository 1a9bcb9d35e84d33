import numpy as np
import pytest

from noodle.errors import GenerationFailed
from noodle.wire.messages import SamplingParameters
from services.stage.worker.logprobs import likeliest, score
from services.stage.worker.sampler import sample


def a_table(rows=5, vocabulary=300, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, vocabulary)).astype(np.float32) * 4


def log_probabilities(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_each_rows_token_gets_its_log_probability_and_the_likeliest_beside_it():
    logits = a_table()
    token_ids = [3, 299, 0, 17, 250]
    expected = log_probabilities(logits)
    for row, (token_id, scored) in enumerate(zip(token_ids, score(logits, token_ids, 4), strict=True)):
        assert scored.logprob == pytest.approx(expected[row, token_id], abs=1e-5)
        best = np.argsort(-expected[row])[:4]
        assert [each.token_id for each in scored.top] == best.tolist()
        assert [each.logprob for each in scored.top] == pytest.approx(expected[row, best].tolist(), abs=1e-5)


def test_among_equals_the_lower_id_comes_first_and_no_more_come_than_exist():
    logits = np.array([1.0, 2.0, 2.0, 0.0], np.float32)
    assert [each.token_id for each in likeliest(logits, 3)] == [1, 2, 0]
    assert [each.token_id for each in likeliest(logits, 1)] == [1]
    assert len(likeliest(logits, 20)) == 4
    assert likeliest(logits, 0) == []


def test_a_greedy_token_has_exactly_the_log_probability_of_the_likeliest():
    """lm-eval compares the two to find out whether a continuation is the greedy one."""
    for seed in range(50):
        row = a_table(1, 1000, seed)[0]
        token_id, logprob = sample(row, SamplingParameters(), 7, with_logprob=True)
        (best,) = likeliest(row, 1)
        (scored,) = score(row[None], [token_id], 1)
        assert (token_id, logprob) == (best.token_id, best.logprob)
        assert scored.logprob == best.logprob


def test_logits_that_are_not_finite_are_refused():
    logits = a_table()
    logits[2, 5] = np.nan
    with pytest.raises(GenerationFailed, match="not finite"):
        score(logits, [0] * 5, 0)
