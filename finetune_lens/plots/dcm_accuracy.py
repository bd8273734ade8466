"""What each group of heads can be made to answer, by desideratum, beside other heads."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, NULL_LINE, PAGE, legend, new_axes, styled
from finetune_lens.results.dcm import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.dcm import Masks

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = {"none": "x", "all": "s", "random in group": "o", "random outside": "D"}
LABELS = {
    "none": "no head", "all": "whole group", "random in group": "as many others of the group",
    "random outside": "as many outside it",
}  # fmt: skip
FEW = 4  # bars that a column holds
TOP = 1.05  # above every accuracy


def dcm_accuracy(result: "Masks", *, ax: "Axes | None" = None) -> "Axes":
    """Accuracy of the target on the test prompts with the learnt heads patched, a bar a desideratum in each group.

    Grey: with other heads patched. Lines: 95 % intervals. Above: how many of the group's heads were learnt.
    Dashed: the chance floor.
    """
    frame = result.to_frame()
    groups, desiderata = result.groups, result.desiderata
    width, narrow = 0.84 / len(desiderata), len(groups) * len(desiderata) <= FEW
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN if narrow else PAGE, height=3.0 if narrow else 2.6)
        entries = {}
        for number, desideratum in enumerate(desiderata):
            part = frame[frame["desideratum"] == desideratum].set_index(["patched", "group"])
            at = np.arange(len(groups)) + (number - (len(desiderata) - 1) / 2) * width
            learnt, colour = part.loc["learnt"].loc[groups], COLOURS[number % len(COLOURS)]
            bars = ax.bar(at, learnt["accuracy"], width=width * 0.9, color=colour, alpha=0.45, lw=0, zorder=1)
            lines = ax.vlines(at, learnt["low"], learnt["high"], color=colour, lw=1.4, zorder=3)
            entries[desideratum] = (bars, lines)
            for x, (_, row) in zip(at, learnt.iterrows(), strict=True):
                ax.text(x, TOP, f"{row['heads']}/{row['of']}", ha="center", va="bottom", fontsize=6.5)
            for place, control in enumerate(CONTROLS):
                other = part.loc[control].loc[groups]
                x = at + (place - (len(CONTROLS) - 1) / 2) * width * 0.2
                ax.vlines(x, other["low"], other["high"], color="0.35", lw=0.6, zorder=4)
                (points,) = ax.plot(
                    x, other["accuracy"], MARKERS[control], color="0.35", mfc="white", ms=3, mew=0.8, zorder=5,
                    clip_on=False,
                )  # fmt: skip
                if other["accuracy"].notna().any():
                    entries[LABELS[control]] = points
        if not np.isnan(result.chance):
            entries["chance"] = ax.axhline(result.chance, color=NULL_LINE, lw=0.8, ls=(0, (3, 2)), zorder=2)
        positions = result.data["position"].values
        ax.set_xticks(np.arange(len(groups)), [f"{g}\n@ {p}" for g, p in zip(groups, positions, strict=True)])
        ax.set_title("heads patched / in the group", loc="left", fontsize=6.5)
        ax.set(ylim=(0, TOP + 0.08), xlim=(-0.5, len(groups) - 0.5), ylabel="accuracy of the target")
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.tick_params(axis="x", length=0)
        order = [*desiderata, *(LABELS[c] for c in CONTROLS), "chance"]
        legend(ax, {name: entries[name] for name in order if name in entries}, own=own, columns=2 if narrow else 4)
    return ax
