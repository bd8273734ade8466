"""Does the update lie in the base's principal directions, or beside them?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import (
    COLUMN,
    COMPONENTS,
    NULL_BAND,
    NULL_LINE,
    grouped,
    legend,
    median,
    new_axes,
    nothing,
    ordered,
    plain_logarithmic,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.updates import Updates


def update_energy(result: "Updates", *, ax: "Axes | None" = None) -> "Axes":
    """Energy of Δ in the base's top-k singular subspaces over its chance value, ‖U_kᵀΔV_k‖²/‖Δ‖² ÷ k²/(out·in),
    against k; both axes logarithmic.

    One thin line a matrix and the median of each component. 1 is what a randomly turned Δ gives on average; the grey
    band is its 95 % interval for a single matrix (median over the matrices).
    """
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import NullLocator

    data = result.data
    energy, chance, low, high = (
        data[name].transpose("matrix", "k").values for name in ("energy", "energy_null", "energy_low", "energy_high")
    )
    ratio = energy / chance
    exists = np.isfinite(ratio).any(1)
    ks = data.k.values
    components = np.array(grouped(data.component.values))
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.9)
        entries = {}
        for name in ordered(components[exists]):
            of_it = ratio[exists & (components == name)]
            colour = COMPONENTS[name]
            lines = [np.column_stack([ks, line]) for line in np.where(of_it > 0, of_it, np.nan)]
            ax.add_collection(LineCollection(lines, colors=colour, linewidths=0.4, alpha=0.45, zorder=1), autolim=False)
            (entries[name],) = ax.plot(ks, median(of_it), "o-", color=colour, lw=1.2, ms=2.5, zorder=2, label=name)
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="k", ylabel="energy in the base's top-k / chance")
        plain_logarithmic(ax.yaxis)
        if entries:
            bottom, top = (median(edge / chance) for edge in (low, high))
            entries["chance, 95 %"] = ax.fill_between(ks, bottom, top, color=NULL_BAND, lw=0, zorder=0)
            ax.axhline(1, color=NULL_LINE, lw=0.7, zorder=0)
        else:
            nothing(ax, "no matrix changed")
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.xaxis.set_minor_locator(NullLocator())
        legend(ax, entries, own=own, columns=4)
    return ax
