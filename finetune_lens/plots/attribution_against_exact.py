"""How far first-order estimates of effects can be trusted here."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS, cell_name, chosen_direction
from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.patching import Patching


def attribution_against_exact(result: "Patching", *, direction: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Attribution against the exact effect, a point a patch; on the line the two agree.

    Coloured by layer where the grid has layers. The worst disagreement is named.

    Raises:
        InputError: only one of the two was measured.
    """
    from matplotlib.ticker import MaxNLocator

    direction = chosen_direction(result, direction)
    agreement = result.agreement().set_index("direction").loc[direction]
    frame = result.to_frame()
    frame = frame[frame["direction"] == direction]
    exact, estimate = frame["effect"].to_numpy(), frame["attribution"].to_numpy()
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN, height=2.9)
        reach = [np.nanmin([exact, estimate]), np.nanmax([exact, estimate])]
        ax.plot(reach, reach, color=NULL_LINE, lw=0.7, zorder=0)
        layered = "layer" in result.dims and frame["layer"].nunique() > 1
        colours = {"c": frame["layer"], "cmap": "viridis", "vmin": 0, "vmax": 1.15 * frame["layer"].max()}
        points = ax.scatter(exact, estimate, s=9, lw=0, zorder=2, **(colours if layered else {"c": OBSERVED}))
        if layered:
            whole = MaxNLocator(8, integer=True)
            bar = ax.figure.colorbar(points, ax=ax, label="layer", pad=0.02, aspect=25, ticks=whole)
            bar.ax.set_ylim(0, frame["layer"].max())
            bar.outline.set_visible(False)
        off = np.abs(estimate - exact)
        if np.isfinite(off).any():
            worst = frame.iloc[int(np.nanargmax(off))]
            ax.plot(worst["effect"], worst["attribution"], "o", mfc="none", color=MARK, ms=6, mew=0.8, zorder=3)
            right = worst["effect"] > np.mean(reach)
            ax.annotate(
                cell_name(worst, result.dims), (worst["effect"], worst["attribution"]), color=MARK, fontsize=7,
                textcoords="offset points", xytext=(-6 if right else 6, 0), ha="right" if right else "left",
                va="center",
            )  # fmt: skip
        metric = LABELS[result.metric]
        ax.set(xlabel=f"exact effect on {metric}", ylabel="attribution", title=direction)
        words = f"rank correlation {agreement['rank_correlation']:.2f}"
        ax.text(0.03, 0.97, words, transform=ax.transAxes, va="top", fontsize=7)
    return ax
