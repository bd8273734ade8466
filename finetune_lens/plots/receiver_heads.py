"""Which heads look back at the same few steps, and at which?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import MARK, NULL_BAND, OBSERVED, PAGE, legend, new_axes, nothing, styled
from finetune_lens.plots.step_matrix import _short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.inside_chains import InsideChains

MOST = 12  # heads
LONGEST = 26  # characters of a question's name
COLOURS = {"base": (OBSERVED, "o", -0.13), "tuned": (MARK, "s", 0.13)}
LINES = {"base": "-", "tuned": (0, (3, 1.5))}


def receiver_heads(
    result: "InsideChains", *, question: str | None = None, axes: "Sequence[Axes] | None" = None
) -> np.ndarray:
    """Kurtosis of the attention that steps receive, of the heads where it is highest in the tuned model; and what the
    steps of one chain receive from the highest of them.

    Intervals are 95 % over questions. Grey: the interval of the null, each later step's attention shuffled among the
    steps it may go to. Returns the axes.

    Args:
        question: whose chain; by default the first of the longest.

    Raises:
        InputError: heads were not measured, or there is no such question.
    """
    from finetune_lens.errors import InputError

    frame = result.receivers(MOST)
    if question is None:
        question = result.questions[int(result.data["measured"].values.argmax())]
    if question not in result.questions:
        raise InputError(f"there is no question {question!r}; the first is {result.questions[0]!r}")
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.4, columns=2)
        entries = {}
        for side, (colour, marker, shift) in COLOURS.items():
            x = np.arange(len(frame)) + shift
            low, high = frame[f"null_{side}_low"], frame[f"null_{side}_high"]
            entries["shuffled"] = axes[0].bar(x, high - low, 0.24, bottom=low, color=NULL_BAND, lw=0)
            error = np.abs(frame[[f"{side}_low", f"{side}_high"]].to_numpy().T - frame[side].to_numpy())
            entries[side] = axes[0].errorbar(
                x, frame[side], error, fmt=marker, ms=3, color=colour, lw=0.8, zorder=3, clip_on=False
            )
        axes[0].axhline(0, color="0.7", lw=0.5, zorder=0)
        axes[0].set_xticks(np.arange(len(frame)), frame["at"], rotation=90 if len(frame) > 8 else 0)
        axes[0].set(xlabel="head (layer.head)", ylabel="kurtosis of attention received")
        _received(result, frame, question, axes[1])
        if not frame["tuned"].notna().any():
            nothing(axes[0], "chains are too short")
        legend(axes[0], entries, own=own, columns=3)
    return np.asarray(axes, dtype=object)


def _received(result: "InsideChains", frame: "object", question: str, ax: "Axes") -> None:
    """The vertical scores of the highest head, step by step."""
    top = frame.iloc[0]  # type: ignore[attr-defined]
    scores = result.data["received"].sel(question=question, layer=top["layer"], head=top["head"])
    for side, (colour, marker, _) in COLOURS.items():
        values = scores.sel(side=side).values
        steps = np.flatnonzero(~np.isnan(values))
        if not len(steps):
            nothing(ax, "its steps are too close")
            break
        ax.plot(steps + 1, values[steps], color=colour, marker=marker, ms=3, lw=1, ls=LINES[side], clip_on=False)
    title = f"head {top['at']}, question {_short(question, LONGEST)}"
    ax.set(xlabel="step", ylabel="attention received", ylim=(0, None), title=title)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
