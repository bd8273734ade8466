"""Does fine-tuning change what single heads do?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, NULL_LINE, OBSERVED, PAGE, legend, nothing, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from finetune_lens.results.paths import Paths

FDR = 0.05
OTHERS = "0.62"
ROW = 4  # panels beside each other
LABEL_TYPE = 6  # pt
AROUND = ((4, 3), (4, -3), (-4, 3), (-4, -3), (5, 0), (-5, 0), (0, 5), (0, -5))  # pt from a point to its label
SIDES, LEVELS = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
HEAD = ["group", "layer", "head"]


def head_effects(result: "Paths", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Mean effect of each head in the tuned model against that in the base, a panel a group of receivers, with 95 %
    intervals; on the line the two are the same. Coloured and named (`layer.head`): heads whose paired difference is
    clear of 0 at a false discovery rate of 5 % over the panel; the largest differences first, as names have room. Heads
    that change nothing in either model are left out. Returns the axes.

    Raises:
        InputError: effects in one model only.
    """
    from finetune_lens.results.paths import WORDS

    frame = result.differences()
    effects = result.to_frame()
    for side, model in zip(("base", "tuned"), result.models, strict=False):
        ends = effects[effects["model"] == model].set_index(HEAD)[["low", "high"]]
        frame = frame.join(ends.add_prefix(f"{side}_"), on=HEAD)
    groups = list(dict.fromkeys(frame["group"]))
    frame = frame[frame["difference"].notna() & ((frame["base"] != 0) | (frame["tuned"] != 0))]
    metric = result.metric
    with styled():
        own = axes is None
        if own:
            axes = _panels(len(groups))
        handles: dict[str, Any] = {}
        for ax, group in zip(axes, groups, strict=True):
            handles |= _scatter(ax, frame[frame["group"] == group])
            ax.set(title=group.replace("_", " "), xlabel=f"effect in {result.models[0]}")
            if not own or ax.get_subplotspec().is_first_col():
                ax.set_ylabel(f"effect in {result.models[1]}")
        title = f"effect: {WORDS[metric]}" if metric in WORDS else f"effect on {LABELS[metric]}"
        legend(axes[0], dict(reversed(handles.items())), own=own, columns=3, title=title)
        axes[0].figure.draw_without_rendering()  # labels look for room
        for ax, group in zip(axes, groups, strict=True):
            _name(ax, frame[frame["group"] == group])
    return np.asarray(axes, dtype=object)


def _panels(number: int) -> np.ndarray:
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    columns = min(number, ROW)
    rows = -(-number // columns)
    width = COLUMN if number == 1 else PAGE
    size = width, rows * (0.8 * width / columns + 0.45) + 0.4
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, FigureClass=StyledFigure)
    for ax in axes.ravel()[number:]:
        ax.axis("off")
    return axes.ravel()[:number]


def _scatter(ax: "Axes", part: "pd.DataFrame") -> dict[str, Any]:
    """Points and crosses of one group, and what the legend calls them."""
    from matplotlib.ticker import MaxNLocator

    if part.empty:
        nothing(ax, "no head has an effect")
    ends = part[["base_low", "base_high", "tuned_low", "tuned_high", "base", "tuned"]].to_numpy()
    ends = ends[np.isfinite(ends)]
    low, high = ends.min(initial=0), ends.max(initial=0)
    margin = 0.05 * (high - low) or 1.0
    reach = low - margin, high + margin
    entries = {"the same in both": ax.plot(reach, reach, color=NULL_LINE, lw=0.7, zorder=0)[0]}
    ax.axhline(0, color="0.88", lw=0.6, zorder=-1)
    ax.axvline(0, color="0.88", lw=0.6, zorder=-1)
    clear = part["p_adjusted"] < FDR
    for chosen, colour, label, order in (
        (~clear, OTHERS, "not clear of 0", 1),
        (clear, OBSERVED, "difference clear of 0", 3),
    ):
        some = part[chosen]
        ax.hlines(some["tuned"], some["base_low"], some["base_high"], color=colour, lw=0.5, alpha=0.7, zorder=order)
        ax.vlines(some["base"], some["tuned_low"], some["tuned_high"], color=colour, lw=0.5, alpha=0.7, zorder=order)
        entries[label] = ax.scatter(some["base"], some["tuned"], s=9, color=colour, lw=0, zorder=order + 1)
    ax.set(xlim=reach, ylim=reach, box_aspect=1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3))
    return entries


def _name(ax: "Axes", part: "pd.DataFrame") -> None:
    """Names of the heads that are clear, largest differences first, where they cover no other name and no point."""
    points, scale = ax.transData.transform(part[["base", "tuned"]].to_numpy()), ax.figure.dpi / 72
    taken = np.hstack([points - 1.5 * scale, points + 1.5 * scale])
    whole = ax.get_window_extent().extents
    clear = part[part["p_adjusted"] < FDR]
    for row in clear.sort_values("difference", key=lambda d: -d.abs(), kind="stable").to_dict("records"):
        for x, y in AROUND:
            note = ax.annotate(
                f"{row['layer']}.{row['head']}", (row["base"], row["tuned"]), xytext=(x, y), fontsize=LABEL_TYPE,
                textcoords="offset points", color=OBSERVED, zorder=5, ha=SIDES[np.sign(x)], va=LEVELS[np.sign(y)],
            )  # fmt: skip
            box = note.get_window_extent().extents
            inside = (box[:2] >= whole[:2]).all() and (box[2:] <= whole[2:]).all()
            if inside and not ((box[:2] < taken[:, 2:]) & (taken[:, :2] < box[2:])).all(1).any():
                taken = np.vstack([taken, box])
                break
            note.remove()
