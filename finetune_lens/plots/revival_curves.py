"""How fast does a capability return, from the tuned model and from its controls?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.revival import Revival

MARKERS = {"tuned": (MARK, "s"), "scratch": (NULL_LINE, "v"), "random": ("#CC79A7", "D")}
OTHERS = ((OBSERVED, "o"), ("#009E73", "^"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"))  # they repeat


def revival_curves(result: "Revival", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Accuracy against steps of training (symlog), a line a start, a panel a file; 95 % bands over seeds and prompts.

    Dotted: the threshold. Dashed: the base, which is not trained.
    """
    with styled():
        own = axes is None
        if own:
            width = COLUMN if len(result.files) == 1 else PAGE
            axes = new_axes(width=width, height=2.5, columns=len(result.files))
        entries = {}
        for ax, file in zip(axes, result.files, strict=True):
            frame = result.curves(file)
            others = iter(OTHERS * len(result.starts))
            for start in result.starts:
                part = frame[frame["start"] == start]
                colour, marker = MARKERS.get(result.role(start)) or next(others)
                band = ax.fill_between(part["step"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
                (line,) = ax.plot(part["step"], part["accuracy"], color=colour, marker=marker, ms=3, clip_on=False)
                entries[start] = (band, line)
            if result.has_base:
                entries["base"] = ax.axhline(result.base(file=file), color="0.3", lw=0.8, ls=(0, (4, 2)), zorder=1)
            entries["threshold"] = ax.axhline(result.threshold, color="0.3", lw=0.8, ls=":", zorder=1)
            _axis(ax, result)
            ax.set(title=f"measured on {file}", ylabel="accuracy")
        room = 65 if len(result.files) == 1 else 130  # letters beside each other
        legend(axes[0], entries, own=own, columns=max(1, room // (max(map(len, entries)) + 6)))
    return np.asarray(axes, dtype=object)


def _axis(ax: "Axes", result: "Revival") -> None:
    from matplotlib.ticker import NullLocator

    last = int(result.steps[-1])
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    powers = [10**n for n in range(9) if 10**n <= last]
    ax.set_xticks([0, *powers], ["0", *(f"{p}" if p < 10_000 else f"10$^{len(str(p)) - 1}$" for p in powers)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(-0.15, last * 1.15), ylim=(-0.03, 1.03), xlabel="steps of training on the task")
