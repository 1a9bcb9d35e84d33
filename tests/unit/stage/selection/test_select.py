"""Which way of computing a stage takes, by made-up measurements, and what it says when it refuses one."""

import pytest

from noodle.errors import ConfigurationError, UnsupportedModel
from noodle.model.formats import ALLOWANCES, Quality
from services.stage.selection.benchmark import MeasuredSeconds
from services.stage.selection.select import ExecutorOptions, candidates, choose, choose_threads

SPEEDS = {
    "ggml q4_0": 1.0,
    "ggml q8_0": 2.0,
    "ggml f16": 3.0,
    "ggml bf16": 3.1,
    "ggml f32": 6.0,
    "transformers f32": 9.0,
}
GOOD, BAD = Quality(1.001, 0.99, 700), Quality(1.4, 0.7, 700)
NO_GGML = "ggml is not installed here. Build it."


def measured(candidate):
    return MeasuredSeconds(SPEEDS.get(str(candidate), 5.0), 0.1, 0.0, 1.0, 0.0)


def names(*arguments):
    return [str(candidate) for candidate in candidates(*arguments)]


def chosen(options=None, quality=lambda _: GOOD, hindrance="", dtype="float32"):
    options = options or ExecutorOptions()
    return choose(
        candidates(options, dtype, hindrance), options.quality, measured, lambda candidate, _seconds: quality(candidate)
    )


def test_the_fastest_allowed_one_is_taken_and_the_comparison_is_told():
    made = chosen()
    assert str(made.candidate) == "ggml q8_0"
    assert made.quality == GOOD
    assert "transformers f32 9000.00" in made.reason
    assert "perplexity times 1.0010" in made.reason


def test_one_that_is_not_good_enough_gives_way_and_is_named():
    made = chosen(quality=lambda candidate: BAD if candidate.weights == "q8_0" else GOOD)
    assert str(made.candidate) == "ggml f16"
    assert "ggml q8_0 is refused (perplexity times 1.400, near-lossless allows 1.01)" in made.reason


def test_agreement_counts_beside_perplexity_and_what_is_not_a_number_is_refused():
    for quality in (Quality(1.0, 0.85, 700), Quality(float("nan"), 1.0, 700)):
        assert chosen(quality=lambda _, it=quality: it).candidate.is_lossless


def test_exact_is_float32_alone_and_asks_for_no_quality():
    made = chosen(ExecutorOptions(quality="exact"), quality=lambda _: pytest.fail("asked"))
    assert str(made.candidate) == "ggml f32"
    assert made.candidate.kv_dtype == "f32"
    assert names(ExecutorOptions(quality="exact"), "float16", "") == ["transformers f32", "ggml f32"]


def test_small_allows_four_bits():
    assert str(chosen(ExecutorOptions(quality="small")).candidate) == "ggml q4_0"
    assert ALLOWANCES["small"].perplexity_ratio > ALLOWANCES["near-lossless"].perplexity_ratio


def test_a_models_own_gguf_is_compared_too_but_never_for_exact():
    assert str(candidates(ExecutorOptions(), "float32", "", has_gguf=True)[1]) == "ggml gguf"
    exact = candidates(ExecutorOptions(quality="exact"), "float32", "", has_gguf=True)
    assert [str(each) for each in exact] == ["transformers f32", "ggml f32"]


def test_without_ggml_transformers_computes():
    assert names(ExecutorOptions(), "float32", NO_GGML) == ["transformers f32"]


def test_a_card_has_its_own_bits_and_float32_behind_them():
    assert names(ExecutorOptions(), "float16", "ggml computes on the CPU alone.") == [
        "transformers f16",
        "transformers f32",
    ]


@pytest.mark.parametrize("options", [ExecutorOptions(executor="ggml"), ExecutorOptions(weights="q8_0")])
def test_what_was_asked_for_and_can_not_be_had_is_named_with_the_cure(options):
    with pytest.raises(ConfigurationError, match="not installed here"):
        candidates(options, "float32", NO_GGML)


def test_a_choice_of_transformers_or_its_dtype_compares_nothing():
    assert names(ExecutorOptions(executor="transformers"), "float32", "") == ["transformers f32"]
    assert names(ExecutorOptions(dtype="bfloat16"), "bfloat16", "") == ["transformers bf16"]


def test_weights_that_were_asked_for_and_are_not_allowed_stop_the_start():
    with pytest.raises(ConfigurationError, match="ggml q4_0 is refused") as caught:
        chosen(ExecutorOptions(weights="q4_0"), quality=lambda _: BAD)
    assert "NOODLE_QUALITY=small" in caught.value.cure


def test_where_quality_can_not_be_measured_only_float32_or_what_was_asked_for_is_used():
    def unknown(_candidate):
        raise UnsupportedModel("there is no tokenizer.")

    assert chosen(quality=unknown).candidate.is_lossless
    assert str(chosen(ExecutorOptions(weights="q8_0"), quality=unknown).candidate) == "ggml q8_0"


@pytest.mark.parametrize(("half_takes", "taken"), [(0.9, 4), (0.97, 8), (1.5, 8)])
def test_half_the_threads_are_taken_where_they_are_clearly_faster(half_takes, taken):
    made, asked = chosen(), []

    def measure(candidate, threads):
        asked.append((str(candidate), threads))
        return MeasuredSeconds(2.0 * half_takes, 0.1 * half_takes, 0.0, 1.0, 0.0)

    threads, told = choose_threads(made, 8, measure)
    assert asked == [("ggml q8_0", 4)]
    assert threads == taken
    assert ("4 threads take" in told.reason) == (taken == 4)
    assert told.seconds == (measure(made.candidate, 4) if taken == 4 else made.seconds)


def test_one_thread_has_no_half():
    made = chosen()
    assert choose_threads(made, 1, lambda *_: pytest.fail("measured")) == (1, made)
