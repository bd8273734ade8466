"""Does the answer stay when something else stands in the chain's place, and how much of it?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import MARK, NULL_BAND, NULL_LINE, OBSERVED, PAGE, legend, new_axes, nothing, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.cot import Faithfulness

SIDES = {"base": (OBSERVED, "-", "o"), "tuned": (MARK, (0, (4, 1.5)), "s")}  # colour, line, marker
TITLES = {
    "early": ("early answering", "share of chain given"),
    "mistakes": ("mistakes", "share of chain before it"),
    "paraphrase": ("paraphrase", "share of chain reworded"),
    "filler": ("filler", "share of chain's tokens"),
    "resample": ("resampled", "share of chain kept"),
}
MOST = 4  # panels a row


def cot_curves(result: "Faithfulness", *, quantity: str = "same", axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Share of chains whose answer is that of the whole chain, a panel a test, with 95 % bands over questions.

    Grey: how often answers behind other questions' chains agree, both sides' intervals together.

    Args:
        quantity: same, or probability (of the whole chain's answer, among the options).
    """
    tests = result.tests
    with styled():
        own = axes is None
        if own:
            columns = min(len(tests), MOST)
            rows = -(-len(tests) // columns)
            made = new_axes(width=PAGE, height=0.45 + 1.55 * rows, columns=columns, rows=rows)
            axes = np.ravel(made)
            for ax in axes[len(tests) :]:
                ax.remove()
            axes = axes[: len(tests)]
        entries: dict[str, Any] = {}
        for number, (ax, test) in enumerate(zip(axes, tests, strict=True)):
            control = result.shuffled()
            if quantity == "same" and control["low"].notna().any():
                low, high = control["low"].min(), control["high"].max()
                band = ax.axhspan(low, high, color=NULL_BAND, lw=0, zorder=0)
                line = ax.axhline(control["agreement"].mean(), color=NULL_LINE, lw=0.7, zorder=0.5)
                entries["another question's answer"] = (band, line)
            drawn = False
            for side, (colour, style, marker) in SIDES.items():
                curve = result.curve(test, side=side, quantity=quantity)
                if curve["mean"].isna().all():
                    continue
                drawn = True
                shade = ax.fill_between(curve["place"], curve["low"], curve["high"], color=colour, alpha=0.18, lw=0)
                (one,) = ax.plot(
                    curve["place"], curve["mean"], color=colour, ls=style, marker=marker, ms=2.6, mfc="white", mew=0.7,
                    markevery=max(1, len(curve) // 5), lw=1.1, clip_on=False,
                )  # fmt: skip
                entries[side] = (shade, one)
            if not drawn:
                nothing(ax, "no curve")
            title, below = TITLES[test]
            ax.set(title=title, xlabel=below, xlim=(0, 1), ylim=(-0.03, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            if own and number % MOST:
                ax.set_yticklabels([])
            else:
                ax.set_ylabel("same answer" if quantity == "same" else "probability of the answer")
        ordered = {name: entries[name] for name in (*SIDES, "another question's answer") if name in entries}
        legend(axes[0], ordered, own=own, columns=3)
    return np.asarray(axes, dtype=object)
