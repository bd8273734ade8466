"""Which questions' answers follow from the chain in the one model, and in the other?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, OBSERVED, new_axes, nothing, styled
from finetune_lens.plots.cot_curves import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.cot import Faithfulness

LARGEST = 90  # area of the largest point, in square points
PLACES = 2  # decimals within which two questions share a point


def cot_scatter(result: "Faithfulness", *, test: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """The share of the largest AOC of each question: base across, tuned model up. A point's area is how many lie there.

    Args:
        test: by default the first that was made.
    """
    test = test or result.tests[0]
    base, tuned = result.values("share", test)
    there = ~np.isnan(base) & ~np.isnan(tuned)
    points, number = np.unique(np.round(np.stack([base, tuned])[:, there], PLACES), axis=1, return_counts=True)
    with styled():
        if ax is None:
            ax = new_axes(width=COLUMN, height=COLUMN)[0]
        ax.plot([0, 1], [0, 1], color="0.7", lw=0.8, zorder=0)
        if len(number):
            areas = LARGEST * number / number.max()
            ax.scatter(*points, s=np.maximum(areas, 6), color=OBSERVED, alpha=0.75, lw=0.6, ec="white", clip_on=False)
            shown = sorted({1, int(number.max())})
            for count in shown:
                size = max(LARGEST * count / number.max(), 6)
                name = f"{count} question{'s' * (count > 1)}"
                ax.scatter([], [], s=size, color=OBSERVED, alpha=0.75, lw=0.6, ec="white", label=name)
            ax.legend(loc="upper left", bbox_to_anchor=(0, 1), labelspacing=0.8)
        else:
            nothing(ax, "no question has a curve in both")
        above, below = int((tuned > base)[there].sum()), int((tuned < base)[there].sum())
        ax.set(
            xlim=(-0.04, 1.04),
            ylim=(-0.04, 1.04),
            aspect="equal",
            title=f"{TITLES[test][0]}: {below} below, {above} above",
        )
        ax.set(xlabel="base: AOC, share of the largest", ylabel="tuned: AOC, share of the largest")
    return ax
