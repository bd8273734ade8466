"""How sharp each layer is, on the way from the base to the tuned model."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, NULL_LINE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.interpolation import Interpolation

MARKERS = "osDv^P"


def interpolation_sharpness(result: "Interpolation", *, file: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Loss that a random perturbation of each layer adds, by layer, a line an α, with 95 % intervals over examples.

    Raises:
        InputError: the sharpness was not measured, or no such file.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    file = file or result.files[0]
    frame = result.sharpness()
    frame = frame[frame["file"] == file]
    alphas = sorted(frame["alpha"].unique())
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(alphas)))
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.4)
        entries = {}
        ax.axhline(0, color=NULL_LINE, lw=0.6, zorder=0)
        for row, (alpha, colour) in enumerate(zip(alphas, colours, strict=True)):
            part = frame[frame["alpha"] == alpha]
            at = part["layer"] + 0.12 * (row - (len(alphas) - 1) / 2)
            lines = ax.vlines(at, part["sharpness_low"], part["sharpness_high"], color=colour, lw=1.0)
            (points,) = ax.plot(at, part["sharpness"], MARKERS[row % len(MARKERS)] + "-", color=colour, lw=0.6)
            entries[f"α = {alpha:g}"] = (lines, points)
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        ax.set(xlabel="layer", ylabel=f"sharpness at ρ = {result.data.attrs['rho']:g} (nats)")
        legend(ax, entries, own=own, columns=4)
    return ax
