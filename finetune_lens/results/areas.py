"""The area over a curve of answers that stay, and the place from which they do."""

import numpy as np


def area(same: np.ndarray, fixed: int | None) -> tuple[float, float]:
    """The area over one curve by the trapezoid rule, and as a share of the largest there can be.

    Args:
        same: (place 0 … n) 1 or 0; NaN where nothing was asked: interpolated, and continued at the ends.
        fixed: the place where it is 1 by definition.

    Returns:
        Both NaN where nothing else was asked.

    >>> area(np.array([0.0, 0.0, 1.0]), -1)
    (0.75, 1.0)
    >>> area(np.array([1.0, np.nan, 1.0]), -1), area(np.array([0.0, 1.0]), None)
    ((0.0, 0.0), (0.5, 0.5))
    """
    n = len(same) - 1
    asked = ~np.isnan(same)
    lowest = np.zeros(n + 1)
    if fixed is not None:
        asked[fixed] = False
        lowest[fixed] = 1
    if not asked.any() or n < 1:
        return float("nan"), float("nan")
    known = np.flatnonzero(~np.isnan(same))
    filled = np.interp(np.arange(n + 1), known, same[known])
    over, most = (1 - float(y.sum() - (y[0] + y[-1]) / 2) / n for y in (filled, lowest))
    return over, over / most


def settled(same: np.ndarray) -> float:
    """k*/n: the least place from which on a curve stays 1, over its last.

    >>> settled(np.array([0.0, 1.0, 0.0, 1.0, 1.0]))
    0.75
    """
    return (len(same) - int(np.logical_and.accumulate(same[::-1] == 1).sum())) / (len(same) - 1)
