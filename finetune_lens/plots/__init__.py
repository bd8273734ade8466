"""Figures: a result in, matplotlib axes out. No model, no torch; matplotlib is imported when something is drawn.

Every function draws into `ax` when it is given one, and makes a figure of the width of a column or page otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from finetune_lens.plots.intruder_counts import intruder_counts
from finetune_lens.plots.intruder_map import intruder_map
from finetune_lens.plots.sigma_against_cosine import sigma_against_cosine
from finetune_lens.plots.similarity import similarity
from finetune_lens.plots.trajectory import trajectory
from finetune_lens.plots.update_energy import update_energy
from finetune_lens.plots.update_map import update_map
from finetune_lens.plots.update_spectrum import update_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from finetune_lens.results import Result

__all__ = [
    "figures_of",
    "intruder_counts",
    "intruder_map",
    "sigma_against_cosine",
    "similarity",
    "trajectory",
    "update_energy",
    "update_map",
    "update_spectrum",
]

# Result kind → title → function. Those of intruders and trajectories are drawn for each side.
_FIGURES: dict[str, dict[str, Callable[..., "Axes"]]] = {
    "intruders": {
        "counts": intruder_counts,
        "map": intruder_map,
        "similarity": similarity,
        "similarity_all": partial(similarity, ranks=None),
        "sigma_against_cosine": sigma_against_cosine,
    },
    "trajectory": {"steps": trajectory},
    "updates": {"spectrum": update_spectrum, "map": update_map, "energy": update_energy},
}


def figures_of(result: "Result") -> dict[str, Callable[[], "Figure"]]:
    """Title → function that draws that figure of the result; titles end in the side when there are two."""
    functions = _FIGURES.get(result.kind, {})
    if result.kind == "updates" and not result.data.sizes["rank"]:  # vectors only
        functions = {"map": update_map}
    if result.kind in ("intruders", "trajectory"):
        several = len(result.sides) > 1
        functions = {
            f"{title}_{side}" if several else title: partial(function, side=side)
            for side in result.sides
            for title, function in functions.items()
        }
    return {title: partial(_drawn, function, result) for title, function in functions.items()}


def _drawn(function: Callable[..., "Axes"], result: "Result") -> "Figure":
    import numpy as np

    return np.ravel(function(result))[0].figure
