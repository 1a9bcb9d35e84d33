"""The sampler against a plain full sort, its distribution, its independence of everything but (seed, position)."""

import numpy as np
import pytest

from noodle.errors import GenerationFailed
from noodle.wire.messages import SamplingParameters
from services.stage.worker.sampler import sample, uniform


def reference_kept(logits: np.ndarray, parameters: SamplingParameters) -> tuple[np.ndarray, np.ndarray, bool]:
    """Token ids that may be drawn and their weights, by a full sort; and whether rounding could decide otherwise."""
    logits = logits.astype(np.float64)
    scaled = (logits - logits.max()) / parameters.temperature
    weights = np.exp(scaled)
    order = np.argsort(-weights, kind="stable")
    borderline = False
    if 0 < parameters.top_k < len(weights):
        order = order[weights[order] >= weights[order[parameters.top_k - 1]]]
    if parameters.top_p < 1:
        running = np.cumsum(weights[order])
        wanted = parameters.top_p * running[-1]
        count = int(np.searchsorted(running, wanted)) + 1
        borderline = bool(np.min(np.abs(running / wanted - 1)) < 1e-6)
        order = order[: min(count, len(order))]
    kept = np.sort(order)
    return kept, weights[kept], borderline


def reference_token(logits: np.ndarray, parameters: SamplingParameters, position: int) -> tuple[int, bool]:
    kept, weights, borderline = reference_kept(logits, parameters)
    running = np.cumsum(weights)
    target = uniform(parameters.seed, position) * running[-1]
    borderline |= bool(np.min(np.abs(running - target)) < 1e-6 * running[-1])
    return int(kept[min(int(np.searchsorted(running, target, side="right")), len(kept) - 1)]), borderline


def random_logits(random: np.random.Generator) -> np.ndarray:
    size = int(random.choice([2, 5, 63, 64, 65, 1000, 5000]))
    logits = random.standard_normal(size) * random.choice([0.0, 0.01, 1.0, 5.0, 30.0])
    if random.random() < 0.4:
        logits = np.round(logits * 2) / 2  # many ties
    return logits.astype(np.float32)


def test_every_draw_is_the_one_of_a_plain_full_sort():
    random = np.random.default_rng(1)
    compared = 0
    for case in range(3000):
        logits = random_logits(random)
        parameters = SamplingParameters(
            temperature=float(random.choice([0.05, 0.5, 0.8, 1.0, 2.0, 50.0])),
            top_p=float(random.choice([1.0, 0.99, 0.95, 0.9, 0.5, 0.1, 1e-6])),
            top_k=int(random.choice([0, 1, 2, 40, 900, 100_000])),
            seed=int(random.integers(1 << 62)),
        )
        expected, borderline = reference_token(logits, parameters, case)
        if not borderline:
            compared += 1
            assert sample(logits, parameters, case, False)[0] == expected, (case, parameters)
    assert compared > 2700  # the others are decided by rounding


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id_among_equals():
    logits = np.array([0.0, 3.0, 1.0, 3.0], np.float32)
    assert sample(logits, SamplingParameters(temperature=0, top_p=0.1, seed=5), 7, False) == (1, None)


def test_top_k_one_is_greedy_at_any_temperature():
    logits = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    for position in range(50):
        token, _ = sample(logits, SamplingParameters(temperature=50, top_k=1, seed=3), position, False)
        assert token == logits.argmax()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_and_no_overflow(temperature):
    logits = np.array([-1e30, 0.5, 0.25, -3e38], np.float32)
    for position in range(20):
        assert sample(logits, SamplingParameters(temperature=temperature, top_p=0.9), position, False)[0] == 1


def test_the_token_depends_on_seed_and_position_alone():
    logits = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    parameters = SamplingParameters(temperature=1, top_p=0.95, seed=11)
    tokens = [sample(logits, parameters, position, False)[0] for position in range(64)]
    again = [sample(logits, parameters, position, True)[0] for position in reversed(range(64))]
    assert tokens == again[::-1]
    assert len(set(tokens)) > 32
    other_seed = SamplingParameters(temperature=1, top_p=0.95, seed=12)
    assert tokens != [sample(logits, other_seed, position, False)[0] for position in range(64)]


def test_the_draw_is_the_same_on_every_machine():
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform((1 << 63) - 1, 1 << 31) == 0.9693538397681389


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -4.0], np.float32)
    parameters = SamplingParameters(temperature=0.9, seed=77)
    draws = 20_000
    counts = np.bincount([sample(logits, parameters, p, False)[0] for p in range(draws)], minlength=len(logits))
    probabilities = np.exp(logits / 0.9) / np.exp(logits / 0.9).sum()
    chi_square = float(((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, 1 in 1,000


def test_a_weight_of_zero_is_never_drawn(monkeypatch):
    logits = np.full(1000, -200.0, np.float32)
    logits[3] = 0.0
    for fraction in (0.0, 0.5, 1 - 2.0**-53):
        monkeypatch.setattr("services.stage.worker.sampler.uniform", lambda seed, position, value=fraction: value)
        assert sample(logits, SamplingParameters(temperature=1), 0, False)[0] == 3


def test_the_logprob_is_of_the_raw_logits_whatever_the_temperature():
    logits = np.random.default_rng(4).standard_normal(300).astype(np.float32) * 4
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    for temperature in (0.0, 0.3, 2.0):
        token, logprob = sample(logits, SamplingParameters(temperature=temperature, top_k=20), 5, True)
        assert logprob == pytest.approx(expected[token], abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_generation(bad):
    logits = np.zeros(100, np.float32)
    logits[50] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationFailed) as failure:
            sample(logits, SamplingParameters(temperature=temperature), 9, False)
        assert "position 9" in str(failure.value)


def test_the_logits_are_left_as_they_were():
    logits = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
    before = logits.copy()
    sample(logits, SamplingParameters(temperature=0.7, top_p=0.9, top_k=50), 1, True)
    assert np.array_equal(logits, before)
