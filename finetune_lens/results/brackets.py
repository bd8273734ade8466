"""How an interval is written in a line of text."""

import math


def ends(low: float | None, high: float | None, form: str = ".3g") -> str:
    """` [low, high]`, to follow its number; nothing where there is no interval, as of a single example."""
    there = None not in (low, high) and not math.isnan(low + high)
    return f" [{low:{form}}, {high:{form}}]" if there else ""
