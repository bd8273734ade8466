"""Are the vectors that the base did not have the strong ones?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import (
    COLUMN,
    COMPONENTS,
    grouped,
    legend,
    new_axes,
    nothing,
    ordered,
    plain_logarithmic,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.intruders import Intruders

VISIBLE = 0.01  # width of an error interval that is drawn
MANY = 3000  # points from which they are drawn smaller, and as pixels


def sigma_against_cosine(
    result: "Intruders", *, side: str | None = None, k: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """max_i |⟨u_j, x_i⟩| (linear) against σ_j of the tuned weights (logarithmic), for the top k vectors of each matrix.

    Coloured by component. Bars: the interval of the true maximum, where it can be seen. Hollow: undetermined. Small
    with a grey edge: near-degenerate σ, where vectors rotate under small updates. Dashed: the run's ε. Dotted, or
    shaded when the sizes differ: sqrt(2 ln n / n), what a random direction gives among n rows (left) or columns
    (right). Vectors with σ = 0 have no place on the axis and are left out.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    side = result.chosen_side(side)
    data = result.data.sel(side=side).isel(rank=slice(result.k if k is None else k))
    verdict = result.verdict().sel(side=side).isel(rank=slice(data.sizes["rank"])).transpose("matrix", "rank").values
    sigma, cosine, lower, upper, gap = (
        data[name].transpose("matrix", "rank").values for name in ("sigma", "max_cos", "lower", "upper", "gap")
    )
    exists = (verdict != -2) & (sigma > 0)
    unsure, degenerate = verdict == -1, gap < float(result.data.attrs["gap"])
    components = np.array(grouped(data.component.values))
    n = data["out" if side == "left" else "in"].values.astype(float)
    chance = np.sqrt(2 * np.log(n) / n)
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=3.2)
        entries = {}
        pixels = exists.sum() > MANY
        for name in ordered(components):
            colour = COMPONENTS[name]
            of_it = exists & (components == name)[:, None]
            barred = of_it & (upper - lower > VISIBLE)
            ax.vlines(sigma[barred], lower[barred], upper[barred], color=colour, lw=0.5, alpha=0.6, zorder=1)
            chosen = sigma[of_it], cosine[of_it]
            hollow, small = unsure[of_it], degenerate[of_it]
            sizes = np.where(small, 5, 9) / (2 if pixels else 1)
            faces = np.where(hollow, "none", colour)
            edges = np.where(hollow, colour, np.where(small, "0.6", "none"))
            ax.scatter(
                *chosen, s=sizes, c=faces, edgecolors=edges, linewidths=0.5, label=name, zorder=2,
                rasterized=bool(pixels), clip_on=False,
            )  # fmt: skip
            entries[name] = Line2D([], [], ls="", marker="o", ms=3, mew=0, color=colour)
        if (unsure & exists).any():
            entries["undetermined"] = Line2D([], [], ls="", marker="o", ms=3, mew=0.5, mfc="none", mec="0.3")
        if (degenerate & exists).any():
            entries["near-degenerate"] = Line2D([], [], ls="", marker="o", ms=2.5, mew=0.5, mfc="0.3", mec="0.7")
        entries[f"ε = {result.epsilon:g}"] = ax.axhline(result.epsilon, color="0.3", lw=0.7, ls="--", zorder=0)
        if chance.min() == chance.max():
            entries["random direction"] = ax.axhline(chance[0], color="0.3", lw=0.8, ls=":", zorder=0)
        else:
            ax.axhspan(chance.min(), chance.max(), color="0.85", lw=0, zorder=-1)
            entries["random direction"] = Patch(color="0.85", lw=0)
        ax.set_xscale("log")
        plain_logarithmic(ax.xaxis)
        ax.set(ylim=(0, 1.02), xlabel="σ$_j$ of the tuned weights", ylabel="max$_i$ |cos| with the base " + f"({side})")
        if not exists.any():
            nothing(ax, "no singular value above 0")
        legend(ax, entries, own=own, columns=3)
    return ax
