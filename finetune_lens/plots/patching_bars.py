"""The patches with the largest effects, with their intervals."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS, cell_name, chosen_direction
from finetune_lens.plots._style import COLUMN, NULL_LINE, OBSERVED, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.patching import Patching


def patching_bars(result: "Patching", *, direction: str | None = None, n: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Mean effect and 95 % interval of each patch, a row a patch: all in their order, or the `n` largest either way."""
    direction = chosen_direction(result, direction)
    frame = result.to_frame()
    if (frame["direction"] == direction).sum() > n:
        frame = result.top(n, direction=direction)
    else:
        frame = frame[frame["direction"] == direction]
    names = [cell_name(row, result.dims) for row in frame.to_dict("records")]
    at = np.arange(len(frame))
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN, height=0.7 + 0.15 * max(4, len(frame)))
        ax.axvline(0, color=NULL_LINE, lw=0.6, zorder=0)
        ax.hlines(at, frame["low"], frame["high"], color=OBSERVED, lw=1.2)
        ax.plot(frame["effect"], at, "o", color=OBSERVED)
        ax.set_yticks(at, names)
        ax.set(
            ylim=(len(frame) - 0.5, -0.5), xlabel=f"effect on {LABELS[result.metric]}", title=direction,
            ylabel={("set",): "", ("layer", "head"): "layer.head"}.get(result.dims, " × ".join(result.dims)),
        )  # fmt: skip
        ax.tick_params(axis="y", length=0)
    return ax
