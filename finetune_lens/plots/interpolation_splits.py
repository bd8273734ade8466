"""From which layer on, and up to which, the tuned model has to be."""

from typing import TYPE_CHECKING

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COLUMN, MARK, OBSERVED, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.interpolation import Interpolation

SIDES = {"above": (OBSERVED, "o-", "tuned from layer ℓ on"), "below": (MARK, "s-", "tuned below layer ℓ")}


def interpolation_splits(
    result: "Interpolation", *, file: str | None = None, metric: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """The metric of models that are the tuned one above, or below, a layer, and the base in the rest; 95 % bands.
    Dotted and dashed: base and tuned model.

    Raises:
        InputError: splits were not measured, or no such file or metric.
    """
    from matplotlib.ticker import MaxNLocator

    file, metric = file or result.files[0], metric or result.main_metric(file)
    frame = result.splits()
    frame = frame[(frame["file"] == file) & (frame["metric"] == metric)]
    gain = result.gain().set_index(["file", "metric"]).loc[(file, metric)]
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.4)
        entries = {}
        for side, (colour, marker, label) in SIDES.items():
            part = frame[frame["side"] == side]
            band = ax.fill_between(part["cut"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
            (line,) = ax.plot(part["cut"], part["mean"], marker, color=colour)
            entries[label] = (band, line)
        for end, style in (("base", ":"), ("tuned", "--")):
            entries[end] = ax.axhline(gain[end], color="0.3", lw=0.8, ls=style, zorder=0)
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        ax.set(xlabel="layer ℓ", ylabel=LABELS[metric])
        legend(ax, entries, own=own, columns=2)
    return ax
