"""Do grafts of several tasks share entries?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.plots._map import CELL_TYPE
from finetune_lens.plots._style import COLUMN, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.grafting import Grafting

FDR = 0.05  # a cell is above chance where its adjusted p-value is below
LONGEST_NAME = 14
ROOM = 32  # letters that fit under the map; longer names stand upright
READABLE = 8  # grafts up to which a column has room for the numbers


def graft_overlap(result: "Grafting", *, ax: "Axes | None" = None) -> "Axes":
    """Which share of the graft j (column) is in the graft i (row): |i∩j|/|j|, and in brackets what a random mask of i's
    size gives, |i|/N. Hatched where chance explains it (adjusted p ≥ 0.05).

    Raises:
        InputError: a result of one graft alone.
    """
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    frame = result.overlap()
    if frame.empty:
        raise InputError("there is no other graft in this result; give graft files of other tasks as `beside`")
    names = [str(n) for n in result.data.graft.values]
    n = len(names)
    values, chance, p = (np.full((n, n), np.nan) for _ in range(3))
    at = tuple(frame[side].map(names.index).to_numpy() for side in ("graft", "other"))
    adjusted = stats.benjamini_hochberg(frame["p_value"])
    for grid, column in ((values, frame["overlap"]), (chance, frame["chance"]), (p, adjusted)):
        grid[at] = column
    labels = [name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :] for name in names]
    upright = max(map(len, labels)) * n > ROOM
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN, height=min(4.0, 1.1 + 0.42 * max(n, 3) + 0.6 * upright))
        ax.set_facecolor("0.92")
        mesh = ax.imshow(
            np.ma.masked_invalid(values), vmin=0, vmax=max(np.nanmax(values, initial=0), 1e-3),
            cmap=mpl.colormaps[SEQUENTIAL], aspect="auto",
        )  # fmt: skip
        for i, j in np.argwhere(~np.isnan(values)):
            light = np.dot(mesh.to_rgba(values[i, j])[:3], (0.299, 0.587, 0.114)) > 0.5
            ink = "black" if light else "white"
            if p[i, j] >= FDR:
                ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc="none", ec="0.6", hatch="//////", lw=0, zorder=2))
            if n <= READABLE:
                text = f"{values[i, j]:.2g}\n({chance[i, j]:.2g})"
                ax.text(j, i, text, ha="center", va="center", fontsize=CELL_TYPE, color=ink, zorder=3)
        ax.set_xticks(np.arange(n), labels, rotation=90 if upright else 0)
        ax.set_yticks(np.arange(n), labels)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(np.arange(n + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", lw=0.6)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="graft j", ylabel="graft i", title="share of j that is in i   (by chance)")
        bar = ax.figure.colorbar(mesh, ax=ax, label="|i∩j| / |j|", pad=0.02, aspect=15)
        bar.outline.set_visible(False)
    return ax
