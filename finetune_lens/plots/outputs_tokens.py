"""Where in a text the two models' predictions differ."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._cells import shown
from finetune_lens.plots._style import COLUMN, MARK, OBSERVED, PAGE, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.outputs import Outputs

NARROW, MOST = 14, 60  # tokens that fit into a column, and at all


def outputs_tokens(result: "Outputs", *, example: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Jensen–Shannon divergence (bits: 0 to 1) of the predictions after each token of one text, tokens on the axis.

    Above each bar where the likeliest next token flips: base's on the left of the arrow, tuned's on the right. By
    default the text whose predictions changed most on average; of a long text, the 60 tokens around its largest change.

    Raises:
        InputError: no such text.
    """
    js = result.data["js"].transpose("example", "position")
    if example is None:
        example = str(js["example"].values[int(np.argmax(np.nan_to_num(np.nanmean(js.values, 1))))])
    elif example not in js["example"].values:
        raise InputError(f"there is no text {example!r}; the first is {js['example'].values[0]!r}")
    one = result.data.sel(example=example)
    there = np.flatnonzero(one["token"].values != "")
    bits = one["js"].values[there] / np.log(2)
    if len(there) > MOST:
        start = int(np.clip(np.nanargmax(bits) - MOST // 2, 0, len(there) - MOST))
        there, bits = there[start : start + MOST], bits[start : start + MOST]
    tops = one["top"].transpose("side", "position").values[:, there]
    flips = one["flip"].values[there] > 0
    at = np.arange(len(there))
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN if len(there) <= NARROW else PAGE, height=2.4)
        ax.bar(at, bits, width=0.7, color=np.where(flips, MARK, OBSERVED))
        small = len(there) > 35
        for x in np.flatnonzero(flips):
            words = f"{shown(str(tops[0, x]))} → {shown(str(tops[1, x]))}"
            ax.text(x, bits[x] + 0.02, words, rotation=90, ha="center", va="bottom", fontsize=4.5 if small else 6)
        ax.set_xticks(at, [shown(str(t)) for t in one["token"].values[there]], rotation=90, fontsize=5 if small else 7)
        ax.set(xlabel="after the token", ylabel="JS divergence (bits)", xlim=(-0.6, len(there) - 0.4))
        ax.set(ylim=(0, 1.5), yticks=[0, 0.5, 1], title=f"text {example}; labelled: likeliest token, base → tuned")
        ax.tick_params(axis="x", length=0)
    return ax
