"""Which places matter: a grid of patches as a heat map."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._cells import FDR, chosen_direction, numbers, token_labels
from finetune_lens.plots._style import COLUMN, DIVERGING, PAGE, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.patching import Patching

NARROW = 20  # columns that fit into a column
ROW = 0.16  # inches a row of cells needs


def patching_heatmap(
    result: "Patching",
    *,
    direction: str | None = None,
    quantity: str | None = None,
    example: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Heat map of a grid of two dimensions: layer × position (tokens on the axis), layer × head or head × position.

    Colour is the recovered share of the difference between donor and recipient (`quantity="effect"`: the mean effect;
    also where that difference is not clear of 0), white at 0. A dot: the effect is clear of 0 at a false discovery
    rate of 5 % over the cells, and across models also of that of a
    donor on another prompt. Cells without a patch are hatched. With `example` the values
    and tokens of that one.

    Raises:
        InputError: a grid of one or three dimensions, or a direction that was not measured.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    if len(result.dims) != 2:
        raise InputError(f"a heat map needs two dimensions; this grid has {', '.join(result.dims)}: draw patching_bars")
    direction = chosen_direction(result, direction)
    values, label = numbers(result, direction, quantity, example)
    rows, columns = values.shape
    names = token_labels(result, example) if "position" in result.dims else None
    with styled():
        if ax is None:
            width = COLUMN if columns <= NARROW else PAGE
            (ax,) = new_axes(width=width, height=min(8.0, max(1.9, 1.0 + ROW * rows)))
        ax.add_patch(
            Rectangle((0, 0), 1, 1, transform=ax.transAxes, fc="0.95", ec="0.8", hatch="//////", lw=0, zorder=0)
        )
        most = np.max(np.abs(values[np.isfinite(values)]), initial=0) or 1.0
        mesh = ax.pcolormesh(
            np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values),
            norm=Normalize(-most, most), cmap=DIVERGING, edgecolors="white", linewidth=0.2 if columns <= 60 else 0,
        )  # fmt: skip
        if example is None:
            _dots(ax, result, direction, values, most)
        xs, ys = (result.data[d].values for d in reversed(result.dims))
        if names is not None:
            long = max(map(len, names)) > 2 or columns > NARROW
            ax.set_xticks(np.arange(columns), names, rotation=90 if long else 0, fontsize=7 if columns <= 40 else 5)
        else:
            _ticks(ax.xaxis, xs, MaxNLocator(16, integer=True))
        _ticks(ax.yaxis, ys, MaxNLocator(16, integer=True))
        ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), ylabel=result.dims[0])
        ax.set_title(direction if example is not None else f"{direction}   (dot: clear of 0)")
        ax.set_xlabel("token (number in brackets: prompts differ)" if names and "(" in "".join(names) else
                      "token" if names else result.dims[1])  # fmt: skip
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, aspect=15)
        bar.outline.set_visible(False)
    return ax


def _ticks(axis, values, locator) -> None:
    if len(values) <= 16:
        axis.set_ticks(np.arange(len(values)), [str(v) for v in values])
    else:
        from matplotlib.ticker import FuncFormatter

        axis.set_major_locator(locator)
        axis.set_major_formatter(
            FuncFormatter(lambda x, _: str(values[round(x)]) if 0 <= round(x) < len(values) else "")
        )


def _dots(ax: "Axes", result: "Patching", direction: str, values: np.ndarray, most: float) -> None:
    """A dot where the effect is clear of 0, black on pale cells and white on dark ones."""
    frame = result.to_frame()
    frame = frame[frame["direction"] == direction]
    sure = frame["p_adjusted"] < FDR
    if "specific" in frame:
        sure &= (frame["specific_low"] > 0) | (frame["specific_high"] < 0)
    clear = sure.to_numpy().reshape(values.shape) & np.isfinite(values)
    for dark, colour in ((False, "black"), (True, "white")):
        y, x = np.nonzero(clear & ((np.abs(values) > 0.6 * most) == dark))
        ax.plot(x, y, ".", color=colour, ms=1.6, mew=0)
