"""At which depth a label can be read out of either model, and whether by the same code."""

from typing import TYPE_CHECKING, Any

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, MARK, NULL_BAND, NULL_LINE, OBSERVED, legend, new_axes, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from finetune_lens.results.probing import Probing

# Colour, mark, the other side, and where beside its depth the control is drawn.
SIDES = {"base": (OBSERVED, "o", "tuned", -0.06), "tuned": (MARK, "s", "base", 0.06)}
CONTROL = "0.35"
FLOOR = -1.0  # R² below which nothing is told apart
LABELS = {"depth": "after so many blocks", "layer": "layer"}


def probe_layers(result: "Probing", *, ax: "Axes | None" = None) -> "Axes":
    """Score by depth (0: the embedding) of the base's and the tuned model's own probes, with 95 % intervals.

    Dashed: the other model's probe on these activations; dotted: after the means of both were made equal. Grey band:
    always the majority class (of values the mean). Grey marks: the control task. R² is drawn from −1 on.

    Raises:
        InputError: heads are probed apart; draw `probe_heads`.
    """
    from matplotlib.ticker import MaxNLocator

    if "head" in result.places:
        raise InputError("heads are probed apart in this result, and this figure is of layers; draw probe_heads")
    (axis,) = result.places
    frame = result.to_frame()
    value, low, high = result.majority()
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=3.2)
        band = ax.axhspan(low, high, color=NULL_BAND, lw=0, zorder=0)
        line = ax.axhline(value, color=NULL_LINE, lw=0.8, zorder=1)
        null = "majority" if result.measure == "accuracy" else "mean"
        entries: dict[str, Any] = {}
        for side, (colour, mark, other, aside) in SIDES.items():
            part = frame[frame["side"] == side]
            at = part[axis]
            entries[side] = _line(ax, part, axis, "score", colour, f"{mark}-")
            entries[f"{side}, {other} probe"] = _line(ax, part, axis, "transfer", colour, "--")
            entries[f"{side}, {other} probe, centred"] = _line(ax, part, axis, "centred", colour, ":")
            if result.has_control:
                x = at + aside
                ends = ax.vlines(x, part["control_low"], part["control_high"], color=CONTROL, lw=0.6, zorder=3)
                (points,) = ax.plot(x, part["control"], mark, color=CONTROL, mfc="white", ms=2.5, zorder=3)
                entries[f"{side}, control"] = (ends, points)
            entries.setdefault(null, (band, line))
        bottom = 0.0
        if result.measure != "accuracy":
            lowest = frame[[name for name in frame if name.endswith("_low")]].drop(columns=["gain_low"])
            bottom = max(FLOOR, min(0.0, float(lowest.min(axis=None)), low))
        ax.set(ylim=(bottom - 0.03 * (1 - bottom), 1.03), xlabel=LABELS[axis])
        ax.set_ylabel(f"{result.measure} on held-out texts")
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        legend(ax, entries, own=own, columns=2)
    return ax


def _line(ax: "Axes", part: "pd.DataFrame", axis: str, name: str, colour: str, style: str) -> tuple[Any, Any]:
    """A line with its band: both, for the legend."""
    plain = style in ("--", ":")
    shade = ax.fill_between(
        part[axis], part[f"{name}_low"], part[f"{name}_high"], color=colour, alpha=0.08 if plain else 0.2, lw=0
    )
    (line,) = ax.plot(part[axis], part[name], style, color=colour, zorder=4 if plain else 5)
    return shade, line
