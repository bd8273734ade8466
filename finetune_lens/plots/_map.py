"""Heat maps of layer × component, for one number a matrix."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import COLUMN, OUTSIDE, PAGE, SEQUENTIAL, grouped, new_axes, ordered

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

NARROW = 16  # layers that fit into a column
CELL_TYPE = 6  # pt


class Cells:
    """Where each matrix lies on the map: rows are components, columns are layers; experts share a cell."""

    def __init__(self, data: "xr.Dataset"):
        labels = grouped(data.component.values, own_names=6)
        self.components = ordered(labels)
        self.layers, self._column = np.unique(data.layer.values, return_inverse=True)
        self._row = np.array([self.components.index(n) for n in labels], dtype=int)

    def total(self, values: np.ndarray) -> np.ma.MaskedArray:
        """Sum over the matrices of each cell (component, layer); cells without a matrix are masked."""
        shape = len(self.components), len(self.layers)
        sums, present = np.zeros(shape), np.zeros(shape, bool)
        np.add.at(sums, (self._row, self._column), values)
        present[self._row, self._column] = True
        return np.ma.masked_array(sums, ~present)


def draw_map(
    cells: Cells,
    values: np.ma.MaskedArray,
    *,
    norm: "Normalize",
    label: str,
    written: Callable[[float], str],
    bar: dict[str, Any],
    ax: "Axes | None",
) -> "Axes":
    """The map with its colour bar; cells hold their number where it can be read, and are hatched where none exists."""
    import matplotlib as mpl
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows, columns = values.shape
    if ax is None:
        width = COLUMN if columns <= NARROW else PAGE
        (ax,) = new_axes(width=width, height=max(1.6, 0.75 + 0.17 * rows))
    box = ax.get_position()
    width, height = ax.figure.bbox.width / ax.figure.dpi, ax.figure.bbox.height / ax.figure.dpi
    cell = 72 * np.array([0.85 * box.width * width / columns, box.height * height / rows])  # 0.85: room for the bar

    ax.add_patch(
        Rectangle(
            (0, 0), 1, 1, transform=ax.transAxes, facecolor="0.95", edgecolor="0.8", hatch="//////", lw=0, zorder=0
        )
    )
    cmap = mpl.colormaps[SEQUENTIAL]
    mesh = ax.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values,
        norm=norm, cmap=cmap, edgecolors="white", linewidth=0.3 if cell[0] > 3 else 0,
    )  # fmt: skip
    texts = {(i, j): written(values[i, j]) for i, j in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True)}
    needed = 0.62 * CELL_TYPE * max(map(len, texts.values()), default=0)
    if cell[0] >= needed + 3 and cell[1] >= CELL_TYPE + 1:
        for (i, j), text in texts.items():
            light = np.dot(mesh.to_rgba(values[i, j])[:3], (0.299, 0.587, 0.114)) > 0.5
            ax.text(j, i, text, ha="center", va="center", fontsize=CELL_TYPE, color="black" if light else "white")
    names = ["–" if layer == OUTSIDE else str(layer) for layer in cells.layers]
    room = max(1, int(0.85 * box.width * width / 0.16))
    if columns <= room:
        ax.set_xticks(np.arange(columns), names)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(room, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names[round(x)] if 0 <= round(x) < columns else ""))
    ax.set_yticks(np.arange(rows), cells.components)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    ax.set_xlabel("layer (–: outside the blocks)" if OUTSIDE in cells.layers else "layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    colour_bar = ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, aspect=15, **bar)
    colour_bar.outline.set_visible(False)
    return ax
