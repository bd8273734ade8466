"""How the search of a graft went."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, OBSERVED, legend, new_axes, plain_logarithmic, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.grafting import Grafting

LEVELS = "viridis"  # a colour a sparsity, dark is the smallest; its pale end is left out


def graft_search(result: "Grafting", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """The rounded mask after every step, step 0 being the base mask: its metric on the selection examples, and its
    entries. A line a sparsity; the circle is the step whose mask was kept. Dashed: the tuned model, dotted: the base,
    on the same examples. Returns the axes.
    """
    import matplotlib as mpl
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    data, levels = result.data, sorted(result.levels)
    steps = np.arange(data.sizes["step"])
    shades = np.linspace(0, 0.85, len(levels)) if len(levels) > 1 else []
    colours = [mpl.colormaps[LEVELS](x) for x in shades] or [OBSERVED]
    gap = result.gap("train")
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=COLUMN, height=2.2, columns=2)
        entries = {}
        for colour, level in zip(colours, levels, strict=True):
            best = int(data.search_best.sel(level=level))
            for ax, name in zip(axes, ("search_metric", "search_entries"), strict=True):
                values = data[name].sel(level=level).values
                (line,) = ax.plot(steps, values, ".-", color=colour, ms=3)
                ax.plot(best, values[best], "o", ms=5.5, mfc="none", mec=colour, mew=1, clip_on=False)
            entries[f"sparsity {level:g}"] = line
        references = {"tuned": (gap["tuned"], (0, (3, 2))), "base": (gap["base"], ":")}
        for side, (value, dashes) in references.items():
            references[side] = axes[0].axhline(value, color="0.3", lw=0.8, ls=dashes, zorder=1)
        axes[0].set(ylabel=LABELS[result.metric], xlabel="step", title="selection examples")
        axes[1].set(ylabel="entries in the mask", xlabel="step", yscale="log")
        plain_logarithmic(axes[1].yaxis)
        for ax in axes:
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        kept = Line2D([], [], ls="", marker="o", ms=5.5, mfc="none", mec="0.3", mew=1)
        legend(axes[0], entries | {"kept": kept, **references}, own=own, columns=3)
    return np.asarray(axes, dtype=object)
