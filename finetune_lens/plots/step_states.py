"""Does the residual stream at a step carry one model's answer into the other?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import DIVERGING, PAGE, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.inside_chains import InsideChains

MOST = 24  # steps on an axis


def step_states(result: "InsideChains", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Recovered share of the donor's answer by depth and place: the prompt, each step from the end, the cue; a panel a
    direction. Colours end at ±1. Returns the axes.

    Raises:
        InputError: states were not patched, or the models answer alike after every chain.
    """
    from matplotlib.colors import Normalize

    frame = result.states()
    steps = sorted({int(p) for p in frame["place"] if p not in ("prompt", "cue")})[-MOST:]
    places = ["prompt", *map(str, steps), "cue"]
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=2.3, columns=2)
        image = None
        for ax, (direction, part) in zip(axes, frame.groupby("direction", sort=False), strict=True):
            table = part.pivot(index="depth", columns="place", values="recovery")[places]
            image = ax.pcolormesh(
                np.arange(len(places) + 1) - 0.5, np.arange(len(table) + 1) - 0.5,
                np.ma.masked_invalid(table.to_numpy()), norm=Normalize(-1, 1), cmap=DIVERGING, edgecolors="white",
                linewidth=0.3,
            )  # fmt: skip
            if len(places) <= 12 and len(table) <= 16:
                for (y, x), value in np.ndenumerate(table.to_numpy()):
                    if np.isfinite(value):
                        colour = "white" if abs(value) > 0.7 else "black"
                        written = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
                        ax.text(x, y, written, ha="center", va="center", fontsize=5.5, color=colour)
            names = [place.replace("-", "−") for place in places]
            ax.set_xticks(np.arange(len(places)), names, rotation=90 if len(places) > 12 else 0)
            ax.yaxis.get_major_locator().set_params(integer=True)
            ax.set(title=direction, xlabel="place (steps from the end)", ylabel="depth")
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        bar = axes[0].figure.colorbar(image, ax=list(axes), label="recovered share", shrink=0.9, pad=0.02, aspect=18)
        bar.outline.set_visible(False)
    return np.asarray(axes, dtype=object)
