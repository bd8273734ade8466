"""How much does the answer depend on each step, from the chain's last one back?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, MARK, NULL_BAND, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.inside_chains import InsideChains

# Quantity → axis; above each other what is measured by cuts and by writing anew.
PANELS = {
    "changed": ("attention cut", "answers that change"),
    "logprob": ("attention cut", "log-probability of\nthe answer (change, nats)"),
    "importance": ("written anew", "right answers,\nwith step − without"),
    "shift": ("written anew", "KL of the answers (nats)"),
}
COLOURS = {"base": (OBSERVED, "o", "-"), "tuned": (MARK, "s", (0, (3, 1.5)))}
MOST = 24  # steps on an axis


def step_importance(result: "InsideChains", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """What cutting attention to a step, or writing the chain anew without it, does to the answer, by the step's place
    from the end, with 95 % intervals over questions. Returns the axes.

    Grey: of both models the interval of as many random tokens cut, and of answers split at random.

    Raises:
        InputError: neither was measured.
    """
    shown = [name for name in PANELS if len(result.rows(name))]
    if not shown:
        raise InputError("neither cuts nor resampling were measured; look_inside_chains(…, rollouts=10) measures both")
    with styled():
        own = axes is None
        if own:
            axes = np.ravel(new_axes(width=PAGE if len(shown) > 1 else COLUMN, height=2.2, columns=len(shown)))
        entries = {}
        for ax, name in zip(axes, shown, strict=True):
            rows = result.rows(name).iloc[:MOST]
            x = rows.index.astype(int).to_numpy()
            wide, spread = x, slice(None)
            if len(x) == 1:  # a band has a width
                wide, spread = np.array([x[0] - 0.1, x[0] + 0.1]), [0, 0]
                ax.set_xlim(x[0] - 0.5, x[0] + 0.5)
            ends = rows.iloc[spread]
            for side in COLOURS:
                if rows[f"null_{side}"].notna().any():
                    entries["by chance"] = ax.fill_between(
                        wide, ends[f"null_{side}_low"], ends[f"null_{side}_high"], color=NULL_BAND, lw=1.2, zorder=1
                    )
            for side, (colour, marker, line) in COLOURS.items():
                shade = ax.fill_between(wide, ends[f"{side}_low"], ends[f"{side}_high"], color=colour, alpha=0.18, lw=0)
                (curve,) = ax.plot(
                    x, rows[side], color=colour, marker=marker, ms=3, ls=line, lw=1.1, clip_on=False, zorder=3
                )
                entries[side] = (shade, curve)
            ax.axhline(0, color="0.7", lw=0.5, zorder=0)
            title, label = PANELS[name]
            ax.set(title=title, ylabel=label, xlabel="step, from the end")
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if name == "changed":
                ax.set_ylim(-0.03, 1.03)
        legend(axes[0], entries, own=own, columns=3)
    return np.asarray(axes, dtype=object)
