"""How much of the tuned model's behaviour a compressed update recovers, and at how many bits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import (
    MARK,
    NULL_LINE,
    OBSERVED,
    PAGE,
    SEQUENTIAL,
    legend,
    new_axes,
    nothing,
    plain_logarithmic,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.compression import Compression

LINES = {
    "ternary": ("ternary, largest |τ|", OBSERVED, "o-"),
    "pruned": ("pruned, 16-bit values", MARK, "s-"),
    "random": ("ternary, random entries", NULL_LINE, "^-"),
}


def compression(result: "Compression", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Left: recovery of the ternary update on every density × α, over all examples; a frame marks the α that is chosen
    at each density. Right: recovery on the examples that did not choose α, against bits a parameter, with 95 %
    intervals; densities from which on fewer bits are needed stand apart. Dashed: the whole update that was compressed,
    in full precision; dotted: the bits of an adapter's own factors. Returns the axes.
    """
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.6, columns=2)
        _map(axes[0], result)
        entries = _lines(axes[1], result)
        legend(axes[1], entries, own=own, columns=5)
    return np.asarray(axes, dtype=object)


def _map(ax: "Axes", result: "Compression") -> None:
    import matplotlib as mpl
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    values, _, _ = result.recovery(result.values("ternary"))
    rows, columns = values.shape
    norm, cmap = Normalize(0, 1), mpl.colormaps[SEQUENTIAL]
    mesh = ax.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values),
        norm=norm, cmap=cmap, edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    if np.isnan(values).all():
        nothing(ax, "recovery is undefined:\ntuned − base is not clear of 0")
    elif columns <= 10 and rows <= 14:
        for (i, j), value in np.ndenumerate(values):
            light = np.dot(mesh.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
            written = f"{value + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")
            ax.text(j, i, written, ha="center", va="center", fontsize=6, color="black" if light else "white")
    if columns > 1:
        for i, j in enumerate(result.chosen("ternary")):
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec=OBSERVED, lw=1.2, zorder=3, clip_on=False))
    ax.set_xticks(np.arange(columns), [f"{s:g}" for s in result.scales])
    ax.set_yticks(np.arange(rows), [f"{d:g}" for d in result.densities])
    ax.set(xlabel="α  (step in units of std(τ))", ylabel="density", title="ternary, all examples   (frame: chosen α)")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(mesh, ax=ax, label=f"recovery of {result.metric}", pad=0.02, aspect=15, extend="both")
    bar.outline.set_visible(False)


def _lines(ax: "Axes", result: "Compression") -> dict[str, object]:
    entries: dict[str, object] = {}
    table = result.table()
    ax.set_xscale("log")
    for method, (label, colour, marker) in LINES.items():
        part = table[table["method"] == method]
        if part["recovery"].isna().all():
            continue
        bits, recovery = part["bits"].to_numpy(), part["recovery"].to_numpy()
        falls = 1 + np.flatnonzero(np.diff(bits) < 0)  # signs alone take fewer bits than signs and where they are
        (line,) = ax.plot(
            np.insert(bits, falls, np.nan), np.insert(recovery, falls, np.nan), marker, color=colour, ms=3, lw=1,
            zorder=3,
        )  # fmt: skip
        bars = ax.vlines(bits, part["low"], part["high"], color=colour, lw=2.5, alpha=0.35, zorder=2)
        entries[label] = (bars, line)
    ax.axhline(0, color="0.7", lw=0.6, zorder=0)
    ax.axhline(1, color="0.7", lw=0.6, zorder=0)
    whole, _, _ = result.recovery(result.reference("blocks"), half="report")
    if np.isnan(whole):
        nothing(ax, "recovery is undefined:\ntuned − base is not clear of 0")
    else:
        entries["whole update, 16 bits"] = ax.axhline(float(whole), color="0.3", lw=0.8, ls=(0, (3, 2)), zorder=2)
    bits = result.data.attrs["factor_bits"]
    if np.isfinite(bits):
        entries["adapter's factors"] = ax.axvline(bits, color="0.3", lw=0.8, ls=":", zorder=2)
    plain_logarithmic(ax.xaxis)
    ax.set(xlabel="bits per parameter", ylabel=f"recovery of {result.metric}", title="α chosen on other examples")
    return entries
