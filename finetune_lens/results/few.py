"""What so few questions can show: intervals that are too narrow, and p-values no smaller than an exact test gives.

A percentile bootstrap of the mean of n normal values is the interval ± z·√((n−1)/n)·s/√n, which a t distribution of
n − 1 degrees covers too seldom; and the resampled means of two values of one sign never reach 0, whatever the values.

>>> f"{coverage(8):.2f}", float(smallest_p(5))
('0.89', 0.0625)
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FEW = 20  # below, a 95 % interval holds less than 93 %


def smallest_p(number: ArrayLike) -> np.ndarray:
    """2^(1−n): the smallest two-sided p of an exact sign test of n paired values that are not 0; 1 of none."""
    return np.minimum(1.0, 0.5 ** (np.asarray(number, dtype=float) - 1))


def two_sided_p(values: ArrayLike) -> np.ndarray:
    """`stats.two_sided_p` of (…, question), no smaller than `smallest_p` of those that are not 0."""
    from finetune_lens import stats

    values = np.asarray(values, dtype=float)
    return np.maximum(stats.two_sided_p(values), smallest_p((~np.isnan(values) & (values != 0)).sum(-1)))


def coverage(number: int) -> float:
    """How often a 95 % percentile interval holds the mean of so many normal values' distribution."""
    from scipy.stats import norm, t

    return float(1 - 2 * t.sf(norm.ppf(0.975) * np.sqrt((number - 1) / number), number - 1))


def caution(number: int) -> list[str]:
    """A line for a summary, where so many questions are few."""
    if not 2 <= number < FEW:
        return []
    least: Any = smallest_p(number)
    return [
        f"{number} questions are few: a 95 % interval over so many holds about {coverage(number):.0%}, and no p is "
        f"below {least:.2g}, that of an exact sign test"
    ]
