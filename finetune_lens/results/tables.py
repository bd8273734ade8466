"""What tables of results share: means, intervals in words, columns of one width, numbers ready for JSON."""

import math
from typing import Any

import numpy as np


def mean_of(values: np.ndarray) -> Any:
    """Over the last axis, NaN left out; NaN where there is nothing."""
    count = (~np.isnan(values)).sum(-1)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = np.where(np.isnan(values), 0, values).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)[()]


def ends(low: float | None, high: float | None, form: str = ".3g") -> str:
    """` [low, high]`, to follow its number; nothing where there is no interval, as of a single example."""
    there = None not in (low, high) and not math.isnan(low + high)
    return f" [{low:{form}}, {high:{form}}]" if there else ""


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines with columns of one width: the first flush left, the others right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in [head, *rows]
    ]


def jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """Ready for JSON: numpy scalars turned into Python's, NaN into None."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()}
