"""Where the gain lives: the largest effects of patches across models, both directions, beside the control."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS, cell_name
from finetune_lens.plots._style import COLUMN, NULL_LINE, OBSERVED, PAGE, PALE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.cmap import CrossPatching


def cmap_bars(result: "CrossPatching", *, n: int = 12, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Mean effect and 95 % interval of the `n` cells with the largest effect in any direction, a panel a direction.

    Open circles: the same patch with the donor run on another prompt, which is what to compare an effect with. Dashed:
    the difference of the whole models, donor − recipient. Returns the axes.
    """
    frame, directions = result.to_frame(), result.directions
    keys = list(result.dims)
    largest = frame.assign(size=frame["effect"].abs()).groupby(keys, sort=False)["size"].max()
    cells = largest.sort_values(ascending=False, kind="stable").head(n).index
    gap = result.gap().set_index("direction")["difference"]
    with styled():
        own = axes is None
        if own:
            axes = new_axes(
                width=PAGE if len(directions) > 1 else COLUMN, height=0.95 + 0.16 * max(4, len(cells)),
                columns=len(directions),
            )  # fmt: skip
        entries = {}
        for ax, direction in zip(axes, directions, strict=True):
            part = frame[frame["direction"] == direction].set_index(keys).loc[cells].reset_index()
            at = np.arange(len(part))
            ax.axvline(0, color=NULL_LINE, lw=0.6, zorder=2)
            if result.has_null:
                (entries["donor on another prompt"],) = ax.plot(
                    part["random_effect"], at, "o", mfc="none", color="0.4", ms=3.5, mew=0.7, zorder=2
                )
            bars = ax.barh(at, part["effect"], height=0.55, color=PALE, zorder=1)
            lines = ax.hlines(at, part["low"], part["high"], color=OBSERVED, lw=1.2, zorder=3)
            entries["effect, 95 %"] = (bars, lines)
            entries["donor − recipient"] = ax.axvline(gap[direction], color="0.3", lw=0.8, ls=(0, (3, 2)), zorder=2)
            ax.set_yticks(at, [cell_name(row, result.dims) for row in part.to_dict("records")])
            ax.set(ylim=(len(part) - 0.5, -0.5), xlabel=f"effect on {LABELS[result.metric]}", title=direction)
            ax.tick_params(axis="y", length=0)
        axes[0].set_ylabel("layer.head" if result.dims == ("layer", "head") else " × ".join(result.dims))
        legend(axes[0], entries, own=own, columns=4 if len(directions) > 1 else 2)
    return np.asarray(axes, dtype=object)
