"""Who follows the hint, does the chain say so, and by which way does the hint act?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import MARK, NULL_BAND, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from finetune_lens.results.bias import Bias

SIDES = {"base": (OBSERVED, "o"), "tuned": (MARK, "s")}
PALE = {"base": "#A6CDE6", "tuned": "#F3C4A0"}
APART = 0.19  # of a row: how far the sides are from its middle
TITLES = ("accuracy", "flips to the hint", "flips whose chain says so", "effect on p(hint)")


def bias_effects(result: "Bias", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """A row a hint, base above tuned model; four panels, with 95 % intervals over questions.

    Accuracy without (open) and with the hint. Flips to the hint among answers that are not the hint's without it; grey:
    what as many changes at random would give. Mentions of the hint in chains that flip to it; grey: the same words in
    chains without it. Direct effect (past the chain; full bars) and indirect effect (through it; pale bars) of the hint
    on the probability of the answer that it points at.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    frame = result.to_frame().set_index(["hint", "measure"])
    hints = result.hints
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=1.05 + 0.42 * max(2, len(hints)), columns=4)
        for number, (ax, title) in enumerate(zip(axes, TITLES, strict=True)):
            ax.set(title=title, ylim=(len(hints) - 0.5, -0.5))
            ax.set_yticks(range(len(hints)), hints if number == 0 else [""] * len(hints))
            ax.tick_params(axis="y", length=0)
            for row in range(1, len(hints)):
                ax.axhline(row - 0.5, color="0.92", lw=0.6, zorder=0)
        for row, hint in enumerate(hints):
            part = frame.loc[hint]
            for side in SIDES:
                at = row + (APART if side == "tuned" else -APART)
                _accuracy(axes[0], part, side, at)
                _rate(axes[1], part, side, at, "flip", "by_chance")
                _rate(axes[2], part, side, at, "raw", "mentions_without")
                _effects(axes[3], part, side, at)
        for ax in axes[:3]:
            ax.set_xlim(-0.04, 1.04)
            ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        _scale(axes[3])
        marks = {"ls": "", "color": NULL_LINE, "ms": 4}
        entries = {side: Line2D([], [], color=colour, marker=mark) for side, (colour, mark) in SIDES.items()}
        entries["without the hint"] = Line2D([], [], marker="o", mfc="white", **marks)
        entries["by chance; the same words without it"] = Line2D([], [], color=NULL_BAND, lw=4)
        entries["past the chain (NDE)"] = Patch(color="0.35")
        entries["through it (NIE)"] = Patch(color="0.75")
        legend(axes[0], entries, own=own, columns=6)
    return np.asarray(axes, dtype=object)


def _scale(ax: "Axes") -> None:
    """Zero within, and no less than a twentieth shown: smaller effects are none to see."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = ax.get_xlim()
    low = low if low < -0.002 else 0
    ax.set_xlim(low, max(high, 0.05))
    if low:
        ax.axvline(0, color=NULL_LINE, lw=0.6, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("0.", ".").replace("-", "−")))


def _accuracy(ax: "Axes", part: "pd.DataFrame", side: str, at: float) -> None:
    colour, mark = SIDES[side]
    before, after = (part.loc[f"accuracy_{name}", side] for name in ("without", "with"))
    ax.plot([before, after], [at, at], color=PALE[side], lw=1.0, zorder=1)
    _interval(ax, part.loc["accuracy_without"], side, at, width=0.7)
    ax.plot(before, at, mark, mfc="white", color=colour, ms=4, mew=0.8, zorder=4, clip_on=False)
    _interval(ax, part.loc["accuracy_with"], side, at)
    ax.plot(after, at, mark, color=colour, ms=4, zorder=4, clip_on=False)


def _rate(ax: "Axes", part: "pd.DataFrame", side: str, at: float, measure: str, null: str) -> None:
    colour, mark = SIDES[side]
    row, chance = part.loc[measure], part.loc[null]
    if np.isnan(row[side]):
        ax.text(0, at, "undefined", va="center", color="0.5", fontsize=6)
        return
    if np.isfinite(chance[side]):
        low, high = chance[f"{side}_low"], chance[f"{side}_high"]
        ax.barh(at, max(high - low, 0.012), left=low, height=0.3, color=NULL_BAND, zorder=1, clip_on=False)
    _interval(ax, row, side, at)
    ax.plot(row[side], at, mark, color=colour, ms=4, zorder=4, clip_on=False)


def _effects(ax: "Axes", part: "pd.DataFrame", side: str, at: float) -> None:
    for measure, colour, up in (("direct", SIDES[side][0], -0.07), ("indirect", PALE[side], 0.07)):
        ax.barh(at + up, part.loc[measure, side], height=0.14, color=colour, zorder=2)
        _interval(ax, part.loc[measure], side, at + up, colour="0.2", width=0.8)


def _interval(
    ax: "Axes", row: "pd.Series", side: str, at: float, *, colour: str | None = None, width: float = 1.2
) -> None:
    ends = row[f"{side}_low"], row[f"{side}_high"]
    ax.plot(ends, [at, at], color=colour or SIDES[side][0], lw=width, zorder=3, clip_on=False)
