"""Which heads reach which receivers: a heat map of layer × head for each group (and model)."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import COLUMN, DIVERGING, PAGE, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.paths import Paths

CLEAR = 0.05
LABELS = {
    "relative_prob": "relative change of\nthe answer's probability", "logit_diff": "change of the\nlogit difference",
    "logprob": "change of the\nlog-probability (nats)", "prob": "change of the\nprobability", "kl": "KL (nats)",
    "reciprocal_rank": "change of the\nreciprocal rank", "accuracy": "change of the\naccuracy",
}  # fmt: skip


def paths(result: "Paths", *, axes: "Any | None" = None) -> "np.ndarray | Axes":
    """Mean effect of the path from every head, white at 0; a panel a group, a row of panels a model.

    A frame: the head was chosen for the circuit; a dot: its effect is clear of 0 (5 % false discovery rate over the
    group's heads). Heads from which no path leads to the receivers are hatched.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    frame, groups, models = result.to_frame(), [*result.groups], result.models
    layers, heads = result.data.sizes["layer"], result.data.sizes["head"]
    most = float(frame["effect"].abs().max()) or 1.0
    with styled():
        if axes is None:
            height = len(models) * max(1.5, min(4.0, 0.55 + 0.14 * layers))
            width = PAGE if len(groups) > 1 else COLUMN
            axes = new_axes(rows=len(models), columns=len(groups), width=width, height=height + 0.4)
        axes = np.array(axes).reshape(len(models), len(groups))
        for row, model in enumerate(models):
            for column, group in enumerate(groups):
                ax = axes[row, column]
                part = frame[(frame["model"] == model) & (frame["group"] == group)]
                values = part["effect"].to_numpy().reshape(layers, heads)
                reached = np.abs(result.values().sel(model=model, group=group).values).max(-1) > 0
                ax.add_patch(
                    Rectangle((0, 0), 1, 1, transform=ax.transAxes, fc="0.95", ec="0.8", hatch="//////", lw=0, zorder=0)
                )
                mesh = ax.pcolormesh(
                    np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5, np.ma.masked_array(values, ~reached),
                    norm=Normalize(-most, most), cmap=DIVERGING, edgecolors="white", linewidth=0.2,
                )  # fmt: skip
                _marks(ax, part, most)
                ax.set(xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5))
                ax.xaxis.get_major_locator().set_params(integer=True)
                ax.yaxis.get_major_locator().set_params(integer=True)
                ax.tick_params(length=0)
                ax.spines[:].set_visible(False)
                if row == 0:
                    ax.set_title(_title(group, result.groups[group], 80 // len(groups)), fontsize=7)
                if row == len(models) - 1:
                    ax.set_xlabel("head")
                if column == 0:
                    ax.set_ylabel("layer" if len(models) == 1 else f"{model}\nlayer")
        bar = axes[0, 0].figure.colorbar(mesh, ax=axes, label=LABELS[result.metric], pad=0.02, aspect=15)
        bar.outline.set_visible(False)
    return axes if axes.size > 1 else axes[0, 0]


def _title(group: str, told: dict[str, Any], width: int) -> str:
    """The group's name where it has one, what it leads to, and where."""
    lines = [] if group in (told["to"], "logits") else [group.replace("_", " ")]
    lines += textwrap.wrap(f"to {told['to'].replace('_', ' ')}", width)
    return "\n".join([*lines, "at the end" if told["position"] == "-1" else f"at {told['position']}"])


def _marks(ax: "Axes", part: Any, most: float) -> None:
    from matplotlib.patches import Rectangle

    for row in part.to_dict("records"):
        if row["chosen"]:
            corner = (row["head"] - 0.45, row["layer"] - 0.45)
            ax.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, ec="black", lw=1, zorder=3))
        if row["p_adjusted"] < CLEAR:
            dark = abs(row["effect"]) > 0.6 * most
            ax.plot(row["head"], row["layer"], ".", color="white" if dark else "black", ms=3, mew=0)
