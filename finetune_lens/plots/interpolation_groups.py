"""Which layers, components or matrices of the update carry the gain."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, PAGE, legend, new_axes, ordered, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from finetune_lens.results.interpolation import Interpolation

LONG = 16  # letters of a name, beyond which a column is too narrow
MEASURES = {"alone": (OBSERVED, "o", "brought by it alone"), "without": (MARK, "s", "lost without it")}


def interpolation_groups(
    result: "Interpolation",
    *,
    file: str | None = None,
    metric: str | None = None,
    n: int = 24,
    ax: "Axes | None" = None,
) -> "Axes":
    """What each group's update brings alone and what is lost without it, with 95 % intervals; of many groups
    those with the largest effect. Dashed: the gain, tuned − base.

    Raises:
        InputError: groups were not scaled, or no such file or metric.
    """
    file, metric = file or result.files[0], metric or result.main_metric(file)
    rows = of_groups(result, file, metric, n)
    gain = result.gain().set_index(["file", "metric"]).loc[(file, metric), "gain"]
    with styled():
        own = ax is None
        if own:
            width = COLUMN if max(map(len, rows["group"])) <= LONG else PAGE
            (ax,) = new_axes(width=width, height=1.0 + 0.19 * max(3, len(rows)))
        entries, at = {}, np.arange(len(rows))
        ax.axvline(0, color=NULL_LINE, lw=0.6, zorder=0)
        for shift, (name, (colour, marker, label)) in zip((-0.14, 0.14), MEASURES.items(), strict=True):
            lines = ax.hlines(at + shift, rows[f"{name}_low"], rows[f"{name}_high"], color=colour, lw=1.0)
            (points,) = ax.plot(rows[name], at + shift, marker, color=colour, ms=3.5)
            entries[label] = (lines, points)
        entries["gain"] = ax.axvline(gain, color="0.3", lw=0.8, ls=(0, (3, 2)), zorder=0)
        ax.set_yticks(at, rows["group"])
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"change of {LABELS[metric]}", ylabel=result.by)
        ax.tick_params(axis="y", length=0)
        legend(ax, entries, own=own, columns=2)
    return ax


def of_groups(result: "Interpolation", file: str, metric: str, n: int) -> "pd.DataFrame":
    """The rows that are shown: layers from below, components in the order of all figures, of many the largest."""
    frame = result.importance()
    rows = frame[(frame["file"] == file) & (frame["metric"] == metric)]
    if len(rows) > n:
        size = rows[["alone", "without"]].abs().max(axis=1)
        return rows.loc[size.sort_values(ascending=False, kind="stable").index[:n]]
    if result.by == "component":
        return rows.set_index("group").loc[ordered(rows["group"])].reset_index()
    return rows
