"""How much of the task a circuit does alone: its score between that of no head and that of the model, beside chance."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, MARK, NULL_BAND, NULL_LINE, OBSERVED, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.circuit_evaluation import CircuitEvaluation


def circuit_faithfulness(result: "CircuitEvaluation", *, ax: "Axes | None" = None) -> "Axes":
    """Scores of each circuit in each model, with 95 % intervals; on the right faithfulness, F(C)/F(M).

    Grey: random circuits of its size, 5 to 95 % and mean. Needed heads: the circuit without those that minimality takes
    out of it.
    """
    table = result.table()
    at = np.arange(len(table))
    with styled():
        own = ax is None
        if own:
            ax = new_axes(width=COLUMN, height=0.85 + 0.34 * max(2, len(table)), columns=1)[0]
        entries = {}
        if np.isfinite(table["random"]).any():
            band = ax.barh(at, table["random_high"] - table["random_low"], left=table["random_low"], height=0.62,
                           color=NULL_BAND, zorder=1)  # fmt: skip
            mean = ax.vlines(table["random"], at - 0.31, at + 0.31, color=NULL_LINE, lw=0.8, zorder=2)
            entries["random circuits, 5–95 %"] = (band, mean)
        floor = ax.vlines(table["floor"], at - 0.31, at + 0.31, color="0", lw=0.8, ls=(0, (1, 1)), zorder=2)
        entries["no head"] = floor
        scores = [
            ("model", "full", "0.25", "white", "s", -0.2), ("circuit", "circuit_score", OBSERVED, OBSERVED, "o", 0),
            ("needed heads", "minimal_score", MARK, MARK, "D", 0.2),
        ]  # fmt: skip
        for name, score, colour, face, marker, shift in scores if result.has_minimality else scores[:2]:
            line = ax.hlines(at + shift, table[f"{score}_low"], table[f"{score}_high"], color=colour, lw=1, zorder=3)
            (dot,) = ax.plot(table[score], at + shift, marker, mec=colour, mfc=face, ms=3, mew=0.8, zorder=4)
            entries[name] = (line, dot)
        one = len(result.models) == 1
        ax.set_yticks(at, [row.circuit if one else f"{row.circuit}\nin {row.model}" for row in table.itertuples()])
        ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=LABELS[result.metric])
        if result.metric in ("accuracy", "prob", "reciprocal_rank"):
            ax.set_xlim(left=0 - ax.margins()[0] * table["full_high"].max())
        ax.tick_params(axis="y", length=0)
        said = [
            "–" if np.isnan(row.faithfulness) else
            f"{row.faithfulness:.2f}\n[{row.faithfulness_low:.2f}, {row.faithfulness_high:.2f}]"
            for row in table.itertuples()
        ]  # fmt: skip
        size = ax.yaxis.get_ticklabels()[0].get_size()
        for row, text in zip([*at, -0.62], [*said, "faithfulness"], strict=True):
            place = {"va": "bottom" if row < 0 else "center", "ha": "left", "size": size}
            ax.text(1.03, row, text, transform=ax.get_yaxis_transform(), **place)
        legend(ax, entries, own=own, columns=2)
    return ax
