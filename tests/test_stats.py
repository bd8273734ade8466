"""Intervals against scipy's and against loops, their coverage, and what missing examples and constants do."""

import numpy as np
import pytest
import scipy.stats

from finetune_lens import stats
from finetune_lens.results.few import caution, coverage
from finetune_lens.stats import (
    benjamini_hochberg,
    interval_of_mean,
    interval_of_ratio,
    rank_correlation,
    resampled_means,
    two_sided_p,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_interval_is_that_of_scipy(rng):
    values = rng.exponential(size=60)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    low, high = interval_of_mean(values, resamples=20_000)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert np.allclose([low, high], theirs.confidence_interval, atol=0.03 * width)
    assert low.shape == high.shape == ()
    narrow = interval_of_mean(values, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_the_interval_is_that_of_a_loop_over_resamples(rng):
    values = rng.normal(size=(3, 12))
    values[1, [2, 5]] = np.nan
    drawn = np.random.default_rng(7).integers(12, size=(500, 12))
    means = np.array([[np.nanmean(row[chosen]) for chosen in drawn] for row in values])
    low, high = interval_of_mean(values, resamples=500, seed=7)
    assert np.allclose([low, high], np.quantile(means, [0.025, 0.975], axis=1))

    denominator = rng.normal(3, 1, size=12)
    denominator[8] = np.nan
    ratios = []
    for row in values:
        both = ~np.isnan(row) & ~np.isnan(denominator)
        over, under = np.where(both, row, np.nan), np.where(both, denominator, np.nan)
        ratios.append([np.nanmean(over[chosen]) / np.nanmean(under[chosen]) for chosen in drawn])
    ratio, *ends = interval_of_ratio(values, denominator, resamples=500, seed=7)
    assert np.allclose(ends, np.quantile(ratios, [0.025, 0.975], axis=1))
    both = ~np.isnan(values[1]) & ~np.isnan(denominator)
    assert ratio[1] == pytest.approx(values[1, both].mean() / denominator[both].mean())


def test_resampled_means_and_ratios_are_those_of_a_loop(rng):
    over, under = rng.normal(size=(2, 7)), rng.normal(5, 1, size=(2, 7))
    over[1, 3] = np.nan
    drawn = np.random.default_rng(4).integers(7, size=(50, 7))
    options = {"resamples": 50, "seed": 4}
    means = stats.resampled_means(over, **options)
    ratio, ratios = stats.resampled_ratio(over, under, **options)
    there = ~np.isnan(over)
    for entry in range(2):
        for n, rows in enumerate(drawn):
            keep = rows[there[entry][rows]]
            assert means[entry, n] == pytest.approx(over[entry, keep].mean())
            assert ratios[entry, n] == pytest.approx(over[entry, keep].mean() / under[entry, keep].mean())
        assert ratio[entry] == pytest.approx(np.nanmean(over[entry]) / under[entry, there[entry]].mean())
    assert np.isnan(stats.resampled_means(np.array([[1.0, np.nan], [np.inf, 1.0]]))).all()
    assert np.isnan(stats.resampled_ratio(over, over * 0, **options)[1]).all()


def test_intervals_cover_the_mean_as_often_as_they_say(rng):
    values = rng.normal(1.0, 2.0, size=(2000, 50))
    low, high = interval_of_mean(values, resamples=1000)
    assert np.mean((low < 1) & (high > 1)) == pytest.approx(0.94, abs=0.015)  # normal, n = 50: 94 % of 95 %
    low, high = interval_of_mean(values, resamples=1000, level=0.8)
    assert np.mean((low < 1) & (high > 1)) == pytest.approx(0.79, abs=0.025)


def test_intervals_of_ratios_cover_the_ratio(rng):
    denominator = rng.normal(2, 1, size=50)
    numerator = 0.5 * denominator + rng.normal(0, 1, size=(2000, 50))  # given the denominators, the ratio is 0.5
    ratio, low, high = interval_of_ratio(numerator, denominator, resamples=1000)
    assert np.mean((low < 0.5) & (high > 0.5)) == pytest.approx(0.94, abs=0.015)
    assert np.allclose(ratio, numerator.mean(1) / denominator.mean())


def test_a_measure_that_is_a_multiple_of_another_has_an_exact_ratio(rng):
    denominator = rng.normal(1, 1, size=40)
    ratio, low, high = interval_of_ratio(0.25 * denominator, denominator)
    assert np.allclose([ratio, low, high], 0.25), "numerator and denominator are resampled together"


def test_every_entry_sees_the_same_draws(rng):
    values = rng.normal(size=30)
    low, high = interval_of_mean(np.stack([values, values + 5, -values]))
    assert np.allclose(low[1], low[0] + 5)
    assert np.allclose([low[2], high[2]], [-high[0], -low[0]])


def test_blocks_change_nothing(rng, monkeypatch):
    values, denominator = rng.normal(size=(2, 3, 5, 17)), rng.normal(4, 1, 17)
    values[0, 1, 2, 3] = np.nan
    whole = [*interval_of_mean(values), *interval_of_ratio(values, denominator), two_sided_p(values)]
    assert {part.shape for part in whole} == {(2, 3, 5)}
    monkeypatch.setattr(stats, "BLOCK", 40_000)  # four entries, and 588 draws, at a time
    parts = [*interval_of_mean(values), *interval_of_ratio(values, denominator), two_sided_p(values)]
    assert np.allclose(whole, parts, rtol=1e-12)
    assert not np.allclose(whole[0], interval_of_mean(values, seed=1)[0], rtol=1e-6), "or the seed does nothing"


def test_memory_is_bounded(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(stats, "BLOCK", 1 << 16)
    values = np.random.default_rng(0).normal(size=(200, 300))
    tracemalloc.start()
    interval_of_mean(values, resamples=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20, "all draws at once would take 12 MB, all means 8 MB"


@pytest.mark.parametrize("examples", [0, 1])
def test_too_few_examples_have_no_interval(examples):
    values = np.ones((2, examples))
    assert np.isnan(interval_of_mean(values)).all()
    assert np.isnan(two_sided_p(values)).all()
    ratio, low, high = interval_of_ratio(values, np.full(examples, 2.0))
    assert np.isnan([low, high]).all()
    assert np.array_equal(ratio, [0.5, 0.5] if examples else [np.nan, np.nan], equal_nan=True)
    assert np.isnan(interval_of_ratio(values, np.zeros(examples))).all()


def test_missing_examples_are_left_out(rng):
    values = rng.normal(3, 1, size=(4, 20))
    values[1, 4:] = np.nan  # some draws hold none of the four
    values[2, 1:] = np.nan
    values[3, 0] = np.inf
    low, high = interval_of_mean(values)
    assert values[1, :4].min() <= low[1] < np.nanmean(values[1]) < high[1] <= values[1, :4].max()
    assert np.isnan([low[2:], high[2:]]).all()
    assert np.isnan(two_sided_p(values))[2:].all()
    assert not np.isnan(two_sided_p(values))[:2].any()
    assert np.isnan(interval_of_ratio(values, np.full(20, 2.0))[1]).tolist() == [False, False, True, True]


def test_a_ratio_to_what_may_be_0_is_undefined(rng):
    numerator = rng.normal(1, 1, size=(2, 30))
    around = rng.normal(0, 1, size=30)
    assert np.isnan(interval_of_ratio(numerator, around - around.mean())).all()
    assert np.isnan(interval_of_ratio(numerator, np.zeros(30))).all()
    assert np.isfinite(interval_of_ratio(numerator, around - around.mean() - 1)).all()
    partly = np.where(np.arange(30) < 10, 5.0, -5.0)  # the numerator of the second lies where this is positive
    numerator[1, 10:] = np.nan
    ratio, _, _ = interval_of_ratio(numerator, np.where(partly > 0, partly, -2.0))
    assert np.isnan(ratio).tolist() == [True, False], "over the examples that are there"


def test_p_values_agree_with_the_interval(rng):
    values = rng.normal(0.3, 1, size=(300, 40))
    low, high = interval_of_mean(values)
    p = two_sided_p(values)
    clear = np.abs(p - 0.05) > 0.002
    assert np.array_equal((p < 0.05)[clear], ((low > 0) | (high < 0))[clear])
    assert 30 < (p < 0.05).sum() < 270
    assert np.allclose(p, two_sided_p(-values))


def test_p_values_under_the_null_are_uniform(rng):
    p = two_sided_p(rng.normal(size=(2000, 60)), resamples=1000)
    assert np.mean(p < 0.5) == pytest.approx(0.5, abs=0.04)
    assert np.mean(p < 0.05) == pytest.approx(0.06, abs=0.02)
    assert two_sided_p(np.zeros(10)) == 1
    assert two_sided_p(np.full(20, 3.0)) == pytest.approx(2 / 10_001)


def test_few_examples_show_no_more_than_an_exact_sign_test(rng):
    """Two examples of one sign: no resampled mean reaches 0, and it is a coin thrown twice all the same."""
    for n in (2, 5, 9):
        values = np.abs(rng.normal(size=n))
        assert stats.percentile_interval(resampled_means(values[None]))[0] > 0, "clear of 0 by the bootstrap alone"
        assert float(two_sided_p(values)) == pytest.approx(scipy.stats.binomtest(n, n).pvalue)
        held = scipy.stats.binomtest(n, n).pvalue
        assert float(two_sided_p([*values, *[0.0] * 30, np.nan])) >= held, "zeros speak for nothing"
    assert two_sided_p(np.zeros((2, 4))).tolist() == [1, 1]
    samples = rng.normal(size=(4000, 5))
    assert (two_sided_p(samples, resamples=400) >= 0.05).all(), "five can never be clear at 5 %"


def test_how_often_an_interval_of_few_examples_holds_the_mean(rng):
    for n in (4, 8, 19):
        low, high = interval_of_mean(rng.normal(size=(1500, n)), resamples=400)
        assert coverage(n) == pytest.approx(np.mean((low < 0) & (high > 0)), abs=0.03)
    assert caution(1) == caution(20) == []
    [said] = caution(4, "texts")
    assert said.startswith("4 texts are few: a 95 % interval over so many holds about 81%")
    assert "below 0.12" in said


def test_the_adjustment_for_many_tests_is_benjamini_hochbergs():
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.5, 0.02]])
    # sorted: .01 .02 .03 .04 .5, times 5 over the rank: .05 .05 .05 .05 .5
    assert np.allclose(benjamini_hochberg(p), [[0.05, 0.05, np.nan], [0.05, 0.5, 0.05]], equal_nan=True)
    assert np.allclose(benjamini_hochberg([0.001, 0.02, 0.9]), [0.003, 0.03, 0.9])
    assert np.isnan(benjamini_hochberg([np.nan])).all()


def test_rank_correlation_is_scipys(rng):
    a = rng.integers(6, size=50)
    b = a + rng.normal(0, 2, size=50)
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.exp(b)) == pytest.approx(rank_correlation(a, b))
    missing = np.where(np.arange(50) % 5, b, np.nan)
    kept = ~np.isnan(missing)
    assert rank_correlation(a, missing) == pytest.approx(scipy.stats.spearmanr(a[kept], b[kept]).statistic)


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [5, 5, 5]), ([2.0], [1.0]), ([], []), ([1, 2], [np.nan, 3])])
def test_constants_have_no_rank_correlation(a, b):
    assert np.isnan(rank_correlation(a, b))


def test_rank_correlation_takes_pairs():
    with pytest.raises(ValueError, match="3 and 2"):
        rank_correlation([1, 2, 3], [1, 2])
