"""What scaling intruder dimensions does to the model, beside their neighbours."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, PAGE, legend, new_axes, nothing, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.intruder_scaling import IntruderScaling

ARMS = {"intruder": ("intruders", MARK, "o-"), "neighbour": ("neighbours", OBSERVED, "s--")}


def intruder_scaling(
    result: "IntruderScaling", *, metric: str = "accuracy", axes: "Sequence[Axes] | None" = None
) -> np.ndarray:
    """Mean metric against λ with intruders scaled and with their neighbours scaled, a panel a file. Returns the axes.

    Bands: 95 % interval of the paired change from the tuned model, about its mean, so that they close at λ = 1. Grey
    lines: tuned model and base.
    """
    from finetune_lens.results.intruder_scaling import LABELS

    frame = result.to_frame()
    frame = frame[frame["metric"] == metric]
    with styled():
        own = axes is None
        if own:
            several = len(result.files) > 1
            axes = new_axes(width=PAGE if several else COLUMN, height=2.4, columns=len(result.files))
        entries = {}
        for ax, file in zip(axes, result.files, strict=True):
            part = frame[frame["file"] == file]
            tuned, base = part["tuned"].iloc[0], part["base"].iloc[0]
            entries["tuned"] = ax.axhline(tuned, color=NULL_LINE, lw=0.7, zorder=0)
            entries["base"] = ax.axhline(base, color=NULL_LINE, lw=0.7, ls=":", zorder=0)
            for arm, (label, colour, line) in ARMS.items():
                if part[arm].notna().any():
                    ends = tuned + part[f"{arm}_low"], tuned + part[f"{arm}_high"]
                    band = ax.fill_between(part["scale"], *ends, color=colour, alpha=0.2, lw=0)
                    (drawn,) = ax.plot(part["scale"], part[arm], line, color=colour)
                    entries[f"{label} scaled, 95 %"] = (band, drawn)
            if result.scaled().empty:
                nothing(ax, "no intruder to scale")
            if metric == "accuracy":
                ax.set_ylim(-0.03, 1.03)
            ax.set(xlabel="λ", title=file)
        axes[0].set_ylabel(LABELS[metric])
        legend(axes[0], entries, own=own, columns=4 if len(result.files) > 1 else 2)
    return np.asarray(axes, dtype=object)
