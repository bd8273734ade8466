"""How the metric grows with the update of each group, from nothing to all of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import PAGE, SEQUENTIAL, new_axes, styled
from finetune_lens.plots.interpolation_groups import of_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.interpolation import Interpolation

TITLES = {"base": "the rest is the base's", "tuned": "the rest is the tuned model's"}


def interpolation_map(
    result: "Interpolation",
    *,
    file: str | None = None,
    metric: str | None = None,
    n: int = 24,
    axes: "Sequence[Axes] | None" = None,
) -> np.ndarray:
    """Heat maps of the metric, group × α: the group's update scaled by α in the base, and in the tuned model.

    Raises:
        InputError: groups were not scaled, or no such file or metric.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    file, metric = file or result.files[0], metric or result.main_metric(file)
    groups = list(of_groups(result, file, metric, n)["group"])
    frame = result.scaling()
    frame = frame[(frame["file"] == file) & (frame["metric"] == metric)]
    tables = {
        context: frame[frame["context"] == context].pivot(index="group", columns="alpha", values="mean").loc[groups]
        for context in TITLES
    }
    limits = (0, 1) if metric == "accuracy" else (frame["mean"].min(), frame["mean"].max())
    norm = Normalize(*limits)
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=0.9 + 0.19 * max(3, len(groups)), columns=2)
        for ax, (context, table) in zip(axes, tables.items(), strict=True):
            values, alphas = table.to_numpy(), table.columns
            rows, columns = values.shape
            mesh = ax.pcolormesh(
                np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values),
                norm=norm, cmap=colormaps[SEQUENTIAL], edgecolors="white", linewidth=0.3,
            )  # fmt: skip
            for (i, j), value in np.ndenumerate(values):
                if columns <= 9 and np.isfinite(value):
                    light = np.dot(mesh.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
                    ax.text(
                        j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="black" if light else "white"
                    )
            ax.set_xticks(np.arange(columns), [f"{a:g}" for a in alphas])
            ax.set_yticks(np.arange(rows), groups)
            ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel="α of the group", title=TITLES[context])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel(result.by)
        axes[1].set_yticklabels([])
        bar = axes[1].figure.colorbar(
            mesh, ax=list(axes), label=LABELS[metric], pad=0.01, aspect=max(15, 2 * len(groups))
        )
        bar.outline.set_visible(False)
    return np.asarray(axes, dtype=object)
