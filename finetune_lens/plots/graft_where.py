"""Where in the model the entries of a graft lie."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._map import NARROW, Cells, draw_map
from finetune_lens.plots._style import COLUMN, NULL_LINE, OBSERVED, PAGE, legend, new_axes, plain_logarithmic, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.grafting import Grafting

WIDE = 3  # largest over smallest density from which the colours are logarithmic


def graft_where(
    result: "Grafting", *, method: str = "graft", level: float | None = None, axes: "Sequence[Axes] | None" = None
) -> np.ndarray:
    """Left: density of the mask, component against layer: entries in the mask, of all entries there; × where none are,
    hatched where there is no weight. Right: each component's share of the mask beside its share of all entries; where
    the two are equal, the mask lies as a random one would. Returns the axes.

    Args:
        method: the mask: graft, or one of those beside it.
        level: sparsity of the base mask, by default the last.
    """
    from matplotlib.colors import LogNorm, Normalize

    level = result.levels[-1] if level is None else level
    data, cells = result.data, Cells(result.data)
    inside = cells.total(data.entries_by_weight.sel(mask=method, level=level).values)
    count = cells.total(data["count"].values)
    density = inside / count
    filled = density.compressed()[density.compressed() > 0]
    low, high = (filled.min(), filled.max()) if len(filled) else (0.0, 1.0)
    norm = LogNorm(low, high) if len(filled) and high > WIDE * low else Normalize(0, high)
    rows, columns = density.shape
    with styled():
        own = axes is None
        if own:
            wide = columns > NARROW
            axes = new_axes(width=PAGE if wide else COLUMN, height=max(1.9, 1.05 + 0.17 * rows), columns=2)
            axes[0].get_gridspec().set_width_ratios([4, 1] if wide else [1.7, 1])
            axes[0].figure.draw_without_rendering()  # the map measures its cells
        shown = np.ma.masked_where(density == 0, density)
        draw_map(
            cells, shown, norm=norm, label="", written=lambda value: f"{value:.2g}", bar={},
            ax=axes[0],
        )  # fmt: skip
        crosses = _zeros(axes[0], density)
        bar = axes[0].collections[0].colorbar
        if isinstance(norm, LogNorm):
            plain_logarithmic(bar.ax.yaxis)
        entries = _bars(axes[1], inside.sum(1), count.sum(1)) | crosses
        axes[1].set(ylim=axes[0].get_ylim(), yticks=[])
        total = int(inside.sum())
        axes[0].set_title(f"{method}, density of the mask")
        axes[1].set_title(f"{total:,} entries, {100 * total / count.sum():.2g} %", x=1, ha="right")
        legend(axes[1], entries, own=own, columns=3)
    return np.asarray(axes, dtype=object)


def _zeros(ax: "Axes", density: np.ma.MaskedArray) -> dict[str, object]:
    """White with a cross where weights exist and none of their entries is in the mask."""
    from matplotlib.patches import Rectangle

    none = np.argwhere((density == 0).filled(False))
    for row, column in none:
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fc="white", ec="0.85", lw=0.3, zorder=1.5))
    if not len(none):
        return {}
    (crosses,) = ax.plot(none[:, 1], none[:, 0], "x", color="0.5", ms=2.5, mew=0.5, zorder=2)
    return {"no entry": crosses}


def _bars(ax: "Axes", inside: np.ma.MaskedArray, count: np.ma.MaskedArray) -> dict[str, object]:
    at = np.arange(len(count))
    whole = ax.barh(at + 0.19, count / count.sum(), height=0.34, color="0.75")
    mask = ax.barh(at - 0.19, inside / max(inside.sum(), 1), height=0.34, color=OBSERVED)
    ax.axvline(0, color=NULL_LINE, lw=0.6)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(left=0)
    ax.set_xlabel("share")
    return {"share of the mask": mask, "of all entries": whole}
