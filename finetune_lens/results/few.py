"""What so few examples can show: intervals that are too narrow, and p-values no smaller than an exact test gives.

A percentile bootstrap of the mean of n normal values is the interval ± z·√((n−1)/n)·s/√n, which a t distribution of
n − 1 degrees covers too seldom.

>>> f"{coverage(8):.2f}"
'0.89'
"""

import numpy as np

from finetune_lens.stats import smallest_p

FEW = 20  # below, a 95 % interval holds less than 93 %


def coverage(number: int) -> float:
    """How often a 95 % percentile interval holds the mean of so many normal values' distribution."""
    from scipy.stats import norm, t

    return float(1 - 2 * t.sf(norm.ppf(0.975) * np.sqrt((number - 1) / number), number - 1))


def caution(number: int, of: str = "examples") -> list[str]:
    """A line for a summary, where so many `of` them are few."""
    if not 2 <= number < FEW:
        return []
    return [
        f"{number} {of} are few: a 95 % interval over so many holds about {coverage(number):.0%}, and no p is "
        f"below {float(smallest_p(number)):.2g}, that of an exact sign test"
    ]
