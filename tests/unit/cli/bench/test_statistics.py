"""The figures of `noodle bench`, against values that can be told by hand."""

import math

import pytest

from services.cli.bench.report import RunTimes, figures_of, percentile, ratio_of

TWO_STREAMS = RunTimes(prompt_tokens=10, arrivals_seconds=((0.5, 0.6, 0.8), (1.0, 1.1, 2.0)))


def run_of(tokens_per_second, tokens=4):
    """One stream whose tokens come evenly."""
    return RunTimes(8, (tuple((index + 1) / tokens_per_second for index in range(tokens)),))


def test_the_percentile_lies_between_neighbours():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.99) == pytest.approx(4.96)
    assert percentile([7.0], 0.99) == 7.0
    assert (percentile([1.0, 9.0], 0.0), percentile([1.0, 9.0], 1.0)) == (1.0, 9.0)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1), ([1.0], math.nan)])
def test_no_percentile_is_made_up(values, share):
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


def test_a_run_ends_with_the_last_token_of_all_its_streams():
    assert TWO_STREAMS.seconds == 2.0
    assert TWO_STREAMS.tokens_per_second == pytest.approx(3.0)


def test_prefill_counts_until_every_stream_has_its_first_token():
    assert TWO_STREAMS.prefill_tokens_per_second == pytest.approx(20.0)


def test_waits_between_tokens_are_those_of_one_stream_never_across_two():
    assert TWO_STREAMS.between_tokens_seconds == pytest.approx([0.1, 0.2, 0.1, 0.9])


def test_figures_pool_waits_and_take_medians_of_runs():
    figures = figures_of([run_of(1.0), run_of(4.0), run_of(2.0)])
    assert figures.tokens_per_second == pytest.approx(2.0)
    assert figures.runs_tokens_per_second == pytest.approx((1.0, 4.0, 2.0))
    assert figures.first_token_seconds == pytest.approx(0.5)
    assert figures.prefill_tokens_per_second == pytest.approx(16.0)
    assert figures.between_tokens_samples == 9
    assert figures.between_tokens_seconds == pytest.approx(0.5)
    assert figures.between_tokens_p99_seconds == pytest.approx(1.0)


def test_one_token_a_stream_leaves_no_wait_to_report():
    figures = figures_of([run_of(2.0, tokens=1)])
    assert (figures.between_tokens_seconds, figures.between_tokens_p99_seconds) == (None, None)
    assert figures.between_tokens_samples == 0


def test_the_ratio_is_the_median_of_neighbours_and_not_the_ratio_of_medians():
    # a machine that slows down by ten between two pairs: the ratio stays
    cluster, control = [run_of(20.0), run_of(2.0), run_of(2.2)], [run_of(10.0), run_of(1.0), run_of(1.0)]
    ratio = ratio_of(cluster, control)
    assert ratio.median == pytest.approx(2.0)
    assert (ratio.least, ratio.most) == (pytest.approx(2.0), pytest.approx(2.2))


def test_unpaired_runs_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ratio_of([run_of(1.0), run_of(1.0)], [run_of(1.0)])
