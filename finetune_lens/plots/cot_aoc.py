"""How much of what it could depends on the chain, by test and model?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import COLUMN, legend, new_axes, styled
from finetune_lens.plots.cot_curves import SIDES, TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.cot import Faithfulness

WIDTH = 0.36  # of a bar
REACHED = (0.1, 0.9)  # beyond these a model ignores or uses its chain


def cot_aoc(result: "Faithfulness", *, ax: "Axes | None" = None) -> "Axes":
    """The area over each curve as a share of the largest there can be, for both models, with 95 % intervals.

    After the tests k*/n, the share of the chain after which the answer stays. Dotted: .1 and .9.
    """
    frame = result.to_frame().set_index(["test", "measure"])
    bars = [(test, "share", TITLES[test][0]) for test in result.tests]
    if "early" in result.tests:
        bars.append(("early", "settled", "k*/n"))
    with styled():
        own = ax is None
        if own:
            ax = new_axes(width=COLUMN, height=2.5)[0]
        entries = {}
        for s, (side, (colour, *_)) in enumerate(SIDES.items()):
            rows = [frame.loc[(test, measure)] for test, measure, _ in bars]
            value, low, high = (
                np.array([row[name] for row in rows], float) for name in (side, f"{side}_low", f"{side}_high")
            )
            at = np.arange(len(bars)) + (s - 0.5) * WIDTH
            face = colour if side == "tuned" else "white"
            entries[side] = ax.bar(at, value, WIDTH, facecolor=face, edgecolor=colour, lw=0.9, zorder=2)
            ends = np.nan_to_num(np.abs(np.stack([value - low, high - value])))
            ax.errorbar(at, value, ends, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=3)
        for level in REACHED:
            ax.axhline(level, color="0.5", lw=0.7, ls=":", zorder=1)
        size = 8 if len(bars) <= 5 else 6
        ax.set_xticks(range(len(bars)), [name.replace(" ", "\n") for *_, name in bars], fontsize=size)
        ax.tick_params(axis="x", length=0)
        ax.set(ylabel="AOC (share of the largest), k*/n", ylim=(0, 1.04), xlim=(-0.6, len(bars) - 0.4))
        legend(ax, entries, own=own, columns=2)
    return ax
