"""Does removing a few units bring a capability back, and what does it cost?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, MARK, NULL_BAND, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.pruning import Pruning

# Label → side, score, colour, line, marker. Random removals are a band.
CURVES = {
    "tuned": ("tuned", "gradient", MARK, "-", "s"),
    "base": ("base", "gradient", OBSERVED, "-", "o"),
    "tuned, largest removed": ("tuned", "magnitude", "#009E73", (0, (3, 1.5)), "^"),
}


def pruning_curves(result: "Pruning", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """The metric against the number of units removed, a panel a file, with 95 % intervals over prompts.

    Base and tuned model are pruned by θ·∂L/∂θ on the base's task. Grey: random removals from the tuned model, mean and
    range over the draws. Dotted: the file's commonest answer. Filled markers: a revival
    (`Pruning.revivals`).
    """
    from matplotlib.lines import Line2D

    frame = result.to_frame()
    files = result.files
    with styled():
        own = axes is None
        if own:
            width = COLUMN if len(files) == 1 else PAGE
            axes = new_axes(width=width, height=2.5, columns=len(files))
        entries = {}
        for ax, file in zip(axes, files, strict=True):
            drawn = result.band(file=file)
            band = ax.fill_between(drawn["count"], drawn["low"], drawn["high"], color=NULL_BAND, lw=0)
            (line,) = ax.plot(drawn["count"], drawn["mean"], color=NULL_LINE, lw=0.9)
            revived = result.revivals(file=file).query("revives")["count"]
            part = frame[frame["file"] == file]
            for label, (side, score, colour, style, marker) in CURVES.items():
                one = part[(part["side"] == side) & (part["score"] == score)]
                shade = ax.fill_between(one["count"], one["low"], one["high"], color=colour, alpha=0.18, lw=0)
                filled = one["count"].isin(revived) & (label == "tuned")
                (curve,) = ax.plot(one["count"], one["mean"], color=colour, ls=style, lw=1.1, clip_on=False)
                faces = np.where(filled, colour, "white")
                ax.scatter(
                    one["count"], one["mean"], s=12, c=faces, edgecolors=colour, marker=marker, linewidths=0.8,
                    zorder=3, clip_on=False,
                )  # fmt: skip
                entries[label] = (shade, curve)
            entries["tuned, random removed"] = (band, line)
            if len(revived):
                entries["a revival"] = Line2D([], [], ls="", marker="s", ms=3.5, color=MARK)
            constant = result.unpruned().set_index("file").loc[file, "commonest"]
            if np.isfinite(constant):
                entries["commonest answer"] = ax.axhline(constant, color="0.3", lw=0.8, ls=":", zorder=1)
            _axis(ax, result)
            ax.set(title=f"measured on {file}", ylabel=LABELS[result.metric])
        legend(axes[0], entries, own=own, columns=2 if len(files) == 1 else 3)
    return np.asarray(axes, dtype=object)


def _axis(ax: "Axes", result: "Pruning") -> None:
    from matplotlib.ticker import NullLocator

    counts = result.counts
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    powers = [10**n for n in range(7) if 10**n <= counts[-1]]
    ax.set_xticks([0, *powers], ["0", *(f"{p:g}" if p < 10_000 else f"10$^{len(str(p)) - 1}$" for p in powers)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(-0.15, counts[-1] * 1.15), xlabel=f"{result.unit}s removed")
    if result.metric == "accuracy":
        ax.set_ylim(-0.03, 1.03)
