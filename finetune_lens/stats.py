"""Statistics over examples: paired bootstrap intervals of means and of ratios of means, p-values, corrections.

Examples are drawn with replacement, all measures of an example together: every leading index of an array sees the same
draws, so differences between layers, positions or models are paired. Intervals are percentile intervals (Efron and
Tibshirani 1993, *An Introduction to the Bootstrap*, §13.3).

Cost of an interval: 2·entries·resamples·examples flops. Memory is bounded: some arrays of 64 MB.

>>> low, high = interval_of_mean([1.0, 2.0, 3.0, 4.0, 5.0])
>>> bool(low < 3 < high)
True
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1 << 23  # numbers in the largest array held


def interval_of_mean(
    values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval of the mean over examples.

    Args:
        values: (…, example); NaN where an example is missing, which leaves it out of the mean.

    Returns:
        Lower and upper end, (…); NaN where fewer than two examples are there, or one is infinite.
    """
    values, lead = _by_example(values)
    ends = np.empty((2, len(values)))
    for rows in _blocks(len(values), resamples):
        ends[:, rows] = percentile_interval(resampled_means(values[rows], resamples=resamples, seed=seed), level=level)
    return ends[0].reshape(lead), ends[1].reshape(lead)


def interval_of_ratio(
    numerator: ArrayLike, denominator: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ratio of means over examples, and its bootstrap interval: numerator and denominator are resampled together.

    Args:
        numerator: (…, example).
        denominator: (example). An example that is NaN in either is left out of both.

    Returns:
        Ratio, lower and upper end, (…); all NaN where the interval of the denominator's mean covers 0, and the ends NaN
        where fewer than two examples are there.
    """
    numerator, lead = _by_example(numerator)
    denominator = np.broadcast_to(np.asarray(denominator, dtype=np.float64), numerator.shape)
    found = np.empty((3, len(numerator)))
    for rows in _blocks(len(numerator), resamples):
        options = {"resamples": resamples, "seed": seed, "level": level}
        ratio, drawn = resampled_ratio(numerator[rows], denominator[rows], **options)
        found[:, rows] = ratio, *percentile_interval(drawn, level=level)
    return tuple(part.reshape(lead) for part in found)


def resampled_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The mean over examples of every resample; what the intervals are taken of.

    Args:
        values: (entry, example); NaN where an example is missing.

    Returns:
        (entry, resample); NaN where no example was drawn that is there, and for all resamples of an entry with fewer
        than two examples, or an infinite one.
    """
    means = np.empty((len(values), resamples))
    present = ~np.isnan(values)
    held = np.where(present, values, 0)
    there = None if present.all() else present.astype(np.float64)
    at = 0
    with np.errstate(all="ignore"):  # infinite entries, and draws of missing examples only
        for counts in _draws(values.shape[1], resamples, seed):
            now = slice(at, at := at + len(counts))
            number = values.shape[1] if there is None else there @ counts.T
            means[:, now] = held @ counts.T / number
    means[np.isinf(held).any(1) | (present.sum(1) < 2)] = np.nan
    return means


def resampled_ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """A ratio of means over examples, and that of every resample: numerator and denominator are drawn together.

    Args:
        numerator, denominator: (entry, example). An example that is NaN in either is left out of both.

    Returns:
        (entry,) and (entry, resample); NaN where the interval of the denominator's mean covers 0, and in every resample
        where fewer than two examples are there.
    """
    present = ~np.isnan(numerator) & ~np.isnan(denominator)
    over, under = (np.where(present, side, np.nan) for side in (numerator, denominator))
    below = resampled_means(under, resamples=resamples, seed=seed)
    low, high = percentile_interval(below, level=level)
    with np.errstate(all="ignore"):
        ratio = np.nansum(over, axis=1) / np.nansum(under, axis=1)
        drawn = resampled_means(over, resamples=resamples, seed=seed) / below
    undefined = ((low <= 0) & (high >= 0)) | ~np.isfinite(ratio)
    ratio[undefined] = drawn[undefined] = np.nan
    return ratio, drawn


def percentile_interval(resampled: np.ndarray, *, level: float = LEVEL) -> np.ndarray:
    """Percentile interval of each entry, (2, entry), from its resamples (entry, resample); NaN ones do not count."""
    ends = np.full((2, len(resampled)), np.nan)
    usable = ~np.isnan(resampled).all(1)
    if usable.any():
        gaps = np.isnan(resampled[usable]).any()
        quantile = np.nanquantile if gaps else np.quantile
        ends[:, usable] = quantile(resampled[usable], [(1 - level) / 2, (1 + level) / 2], axis=1)
    return ends


def two_sided_p(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap p-value of "the mean over examples is 0": the level at which the percentile interval reaches 0.

    p = min(1, 2·(1 + min(#{m* ≤ 0}, #{m* ≥ 0})) / (1 + resamples)) over the resampled means m*; never below
    2 / (1 + resamples), nor below `smallest_p` of the examples that are not 0: resampled means of two values of
    one sign never reach 0, whatever the values.

    Args:
        values: (…, example), as for `interval_of_mean`.

    Returns:
        (…); NaN where fewer than two examples are there, or one is infinite.
    """
    values, lead = _by_example(values)
    p = np.empty(len(values))
    for rows in _blocks(len(values), resamples):
        means = resampled_means(values[rows], resamples=resamples, seed=seed)
        tail = np.minimum((means <= 0).sum(1), (means >= 0).sum(1))
        drawn = (~np.isnan(means)).sum(1)
        p[rows] = np.where(drawn == 0, np.nan, 2 * (1 + tail) / (1 + drawn))
    least = smallest_p((~np.isnan(values) & (values != 0)).sum(1))
    return np.clip(p, least, 1).reshape(lead)


def smallest_p(number: ArrayLike) -> np.ndarray:
    """2^(1−n): the smallest two-sided p of an exact sign test of n paired values that are not 0; 1 of none."""
    return np.minimum(1.0, 0.5 ** (np.asarray(number, dtype=float) - 1))


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
    """p-values adjusted for the false discovery rate over all entries of `p`, in its shape; NaN is no test.

    Benjamini and Hochberg 1995.
    """
    from scipy.stats import false_discovery_control

    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        adjusted[tested] = false_discovery_control(p[tested])
    return adjusted


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's ρ of two vectors, ties sharing their mean rank; pairs with a NaN are left out.

    NaN when one of the two is constant, or fewer than two pairs are there.

    Raises:
        ValueError: vectors of different length.
    """
    from scipy.stats import rankdata

    a, b = (np.asarray(side, dtype=np.float64).ravel() for side in (a, b))
    if len(a) != len(b):
        raise ValueError(f"expected two vectors of one length, found {len(a)} and {len(b)} numbers")
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = (rankdata(side[both]) for side in (a, b))
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def calibration(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> tuple[np.ndarray, float]:
    """Reliability curve and expected calibration error (Guo et al. 2017, arXiv 1706.04599, §2), in bins of equal width.

    ECE = Σ_bins (n_bin/n)·|accuracy − confidence|.

    Args:
        confidence: (example) probability of what was predicted.
        correct: (example) 1 where it was right, 0 where not. Examples that are NaN in either are left out.

    Returns:
        (bin, 3): mean confidence, accuracy, number; NaN, NaN, 0 where a bin is empty. And the error.
    """
    confidence, correct = (np.asarray(side, dtype=np.float64).ravel() for side in (confidence, correct))
    there = ~np.isnan(confidence) & ~np.isnan(correct)
    confidence, correct = confidence[there], correct[there]
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    number = np.bincount(which, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, weights=side, minlength=bins) / number for side in (confidence, correct)]
    error = float(np.nansum(number * np.abs(means[1] - means[0])) / len(confidence)) if len(confidence) else np.nan
    return np.stack([*means, number], axis=1), error


def _by_example(values: ArrayLike) -> tuple[np.ndarray, tuple[int, ...]]:
    """The leading axes as one, and their shape."""
    values = np.asarray(values, dtype=np.float64)
    *lead, examples = values.shape
    return values.reshape(math.prod(lead), examples), tuple(lead)


def _blocks(count: int, resamples: int) -> Iterator[slice]:
    step = max(1, BLOCK // resamples)
    return (slice(start, start + step) for start in range(0, count, step))


def _draws(examples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each example is drawn, (resample, example), some resamples at a time; the same for one seed."""
    generator = np.random.default_rng(seed)
    step = max(1, BLOCK // 4 // max(1, examples))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(examples, size=(count, examples))
        drawn += examples * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * examples).reshape(count, examples).astype(np.float64)
