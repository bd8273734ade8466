"""How many directions the update uses, and how strong they are."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import (
    COLUMN,
    COMPONENTS,
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

POINTS = 200  # ranks drawn of a long spectrum, evenly on the logarithmic axis


def update_spectrum(result: "Updates", *, ax: "Axes | None" = None) -> "Axes":
    """Singular values of Δ over the largest of W0, σ_j(Δ)/‖W0‖₂, against rank j; both axes logarithmic.

    One thin line a matrix and the median of each component, which ends where half of its matrices have. Values that
    are zero to numerical precision or to the stored type (ranks beyond `delta_rank`) are not drawn. The legend gives
    the median effective rank of each component.
    """
    from matplotlib.collections import LineCollection

    data = result.data
    values = (data.sigma_delta / data.sigma_base.isel(rank=0)).transpose("matrix", "rank")
    real = (data["rank"] <= data.delta_rank).transpose("matrix", "rank").values & np.isfinite(values.values)
    changed = real.any(1)
    components = np.array(grouped(data.component.values))
    ranks = data["rank"].values
    kept = (
        np.unique(np.geomspace(1, len(ranks), POINTS).round().astype(int)) - 1 if len(ranks) > POINTS else slice(None)
    )
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.9)
        entries = {}
        for name in ordered(components[changed]):
            of_it = np.flatnonzero(changed & (components == name))
            colour = COMPONENTS[name]
            lines = np.where(real[of_it], values.values[of_it], np.nan)
            drawn = [np.column_stack([ranks[kept], line[kept]]) for line in lines]
            ax.add_collection(LineCollection(drawn, colors=colour, linewidths=0.4, alpha=0.45, zorder=1))
            middle = median(np.where(np.isfinite(lines), lines, 0))
            middle[middle == 0] = np.nan
            effective = np.median(data.effective_rank.values[of_it])
            (entries[f"{name}  {effective:.1f}"],) = ax.plot(
                ranks[kept], middle[kept], color=colour, lw=1.3, zorder=2, label=name
            )
        ax.set(xscale="log", yscale="log", xlabel="rank j", ylabel="σ$_j$(Δ) / ‖W0‖$_2$")
        plain_logarithmic(ax.xaxis)
        if entries:
            ax.autoscale_view()
            ax.set_xlim(left=1)
        else:
            nothing(ax, "no matrix changed")
        legend(ax, entries, own=own, columns=4, title="median effective rank of Δ")
    return ax
