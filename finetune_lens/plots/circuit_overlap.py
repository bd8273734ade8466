"""Do two circuits share heads, and in the same roles?"""

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._map import CELL_TYPE
from finetune_lens.plots._style import COLUMN, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.circuit_overlap import CircuitOverlap

FDR = 0.05  # a cell is above chance where its adjusted p-value is below
NARROW = 5  # groups that fit into a column
HATCH = (0.7, 0.7, 0.7, 0.6)
LINE = 12  # letters of a name


def circuit_overlap(result: "CircuitOverlap", *, ax: "Axes | None" = None) -> "Axes":
    """Heads that a group of one circuit (row) shares with a group of the other (column): their number, in brackets what
    as many random heads of the model give, and as colour the share of the row's group. Hatched where chance explains
    it (p ≥ 0.05, adjusted over the cells). In brackets at the names, the heads of a group.
    """
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    frame = result.matrix()
    rows, columns = (list(dict.fromkeys(frame[side])) for side in ("group", "other_group"))
    at = tuple(frame[side].map(names.index) for side, names in (("group", rows), ("other_group", columns)))
    share = np.full((len(rows), len(columns)), np.nan)
    share[at] = frame["share"]
    with styled():
        if ax is None:
            wide = len(columns) > NARROW
            (ax,) = new_axes(width=PAGE if wide else COLUMN, height=min(8.0, 0.95 + 0.42 * max(len(rows), 3)))
        mesh = ax.imshow(share, vmin=0, vmax=1, cmap=mpl.colormaps[SEQUENTIAL], aspect="auto")
        for i, j, row in zip(*at, frame.to_dict("records"), strict=True):
            light = np.dot(mesh.to_rgba(share[i, j])[:3], (0.299, 0.587, 0.114)) > 0.5
            if row["p_adjusted"] >= FDR:
                ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc="none", ec=HATCH, hatch="//////", lw=0, zorder=2))
            chance = f"{row['chance']:.2g}" if row["chance"] < 10 else f"{row['chance']:.0f}"
            text = f"{row['shared']}\n({chance})" if result.shape_known else f"{row['shared']}"
            colour = "black" if light else "white"
            ax.text(j, i, text, ha="center", va="center", fontsize=CELL_TYPE, color=colour, zorder=3)
        for axis, names, side, group in (
            (ax.xaxis, columns, "other", "other_group"),
            (ax.yaxis, rows, "one", "group"),
        ):
            sizes = frame.drop_duplicates(group).set_index(group)[side]
            axis.set_ticks(np.arange(len(names)), [_label(name, sizes[name]) for name in names])
            axis.set_ticks(np.arange(len(names) + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", lw=0.6)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        title = "heads shared   (by chance)" if result.shape_known else "heads shared"
        ax.set(xlabel=f"group in {result.other}", ylabel=f"group in {result.one}", title=title)
        bar = ax.figure.colorbar(mesh, ax=ax, label="share of the row's group", pad=0.02, aspect=15)
        bar.outline.set_visible(False)
    return ax


def _label(name: str, size: int) -> str:
    return fill(name.replace("_", " "), LINE, break_long_words=False) + f"\n({size})"
