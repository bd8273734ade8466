"""How few entries of the update carry what it taught, and do other masks of that size?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens import stats
from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, legend, new_axes, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from finetune_lens.results.grafting import Grafting

# In the order of the legend; the graft is drawn last, on top.
METHODS = {
    "graft": (OBSERVED, "o"), "largest |Δ|": (MARK, "s"), "largest |g⊙Δ|": ("#009E73", "^"),
    "movement": ("#CC79A7", "D"), "random": (NULL_LINE, "v"),
}  # fmt: skip
WHOLE = "all of the blocks"
APART = 1.07  # factor between the points of methods that have one share, where there is a single sparsity


def graft_recovery(result: "Grafting", *, file: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Rel = (P_γ − P_0)/(P_1 − P_0) of each mask against its share of the blocks' entries, with 95 % intervals.

    A line a method over the sparsities, in the order of the shares; of a single sparsity, points beside each other.
    Lines at 1 (the tuned model) and 0.95. Where Rel is undefined, the metric itself, with that of base and tuned model.

    Args:
        file: on whose examples; by default the first that was held out.
    """
    file = file or result.held_out
    frame = result.to_frame()
    frame = frame[frame["file"] == file]
    undefined = bool(frame["recovery"].isna().all())
    single = len(result.levels) == 1
    methods = [m for m in METHODS if m in set(frame["method"])]
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.6)
        ax.set_xscale("log")
        entries = {}
        for number, method in enumerate([*methods, WHOLE]):
            part = frame[frame["method"] == method].sort_values("share")
            colour, marker = METHODS.get(method, ("black", "*"))
            values, low, high = _drawn(result, part, file, undefined)
            shift = APART ** (number - (len(methods) - 1) / 2) if single and method != WHOLE else 1.0
            at = part["share"].to_numpy() * shift
            over = {"zorder": 10 - number, "clip_on": False}
            bars = ax.vlines(at, low, high, color=colour, lw=0.9, **over)
            style = "none" if single or method == WHOLE else "-"
            size = 5.5 if method == WHOLE else 3.5
            (line,) = ax.plot(at, values, ls=style, marker=marker, ms=size, mew=0, color=colour, **over)
            entries[method] = (bars, line)
        if undefined:
            gap = result.gap(file)
            for side, dashes in (("tuned", (0, (3, 2))), ("base", ":")):
                entries[f"{side} model"] = ax.axhline(gap[side], color="0.3", lw=0.8, ls=dashes, zorder=1)
            ax.text(
                0.5, 0.96, "recovery is undefined:\ntuned − base is not clear of 0", transform=ax.transAxes,
                ha="center", va="top", color="0.4", fontsize=7,
            )  # fmt: skip
            low, high = (-0.03, 1.0) if result.metric == "accuracy" else ax.get_ylim()
            ax.set_ylim(low, high + 0.35 * (high - low))  # room for the note
        else:
            ax.axhline(0, color="0.8", lw=0.6, zorder=0)
            ax.axhline(1, color="0.3", lw=0.7, ls=(0, (3, 2)), zorder=1)
            ax.axhline(0.95, color="0.3", lw=0.7, ls=":", zorder=1)
            ax.text(
                0.97, 0.94, "0.95", transform=ax.get_yaxis_transform(), ha="right", va="top", color="0.3", fontsize=6
            )
        metric = LABELS[result.metric]
        ax.set(
            xlim=(frame["share"].min() / 1.6, 1.0), xlabel="share of the blocks' entries", title=f"measured on {file}",
            ylabel=metric if undefined else f"recovery of {metric.partition(' (')[0]}",
        )  # fmt: skip
        legend(ax, entries, own=own, columns=3)
    return ax


def _drawn(
    result: "Grafting", part: "pd.DataFrame", file: str, undefined: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and interval of each row: Rel, or the metric itself."""
    if not undefined:
        return tuple(part[name].to_numpy() for name in ("recovery", "recovery_low", "recovery_high"))
    methods = part["method"].replace(WHOLE, "blocks")
    rows = zip(methods, part["level"], strict=True)
    found = np.stack([result.values(result.metric, file=file, method=m, level=level) for m, level in rows])
    return np.nanmean(found, axis=-1), *stats.interval_of_mean(found)
