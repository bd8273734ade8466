"""Share of a difference that is moved against how far the behaviour moves: one form for all that measures it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric of each example, at rising shares of the parameters, directions or sites that are moved.

    Attributes:
        method: what was moved, and in which order.
        unit: "parameters", "directions" or "sites".
        shares: (point,) of them that are moved.
        values: (point, example), higher = better; NaN where an example was not measured.
        base: (example,) of the base.
        tuned: (example,) of the tuned model.
        labels: one a point.
        alternatives: no point leads to the next (each layer alone, several models at one share).
    """

    method: str
    unit: str
    shares: np.ndarray
    values: np.ndarray
    base: np.ndarray
    tuned: np.ndarray
    labels: list[str]
    alternatives: bool = False
