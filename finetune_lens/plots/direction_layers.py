"""Is the direction between two classes the same in both models, and does it do the same?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import MARK, NULL_BAND, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.directions import Directions

BETWEEN = "#009E73"
COLOURS = {"base": OBSERVED, "tuned": MARK}
STYLES = {"own": ("o-", 0.2), "other": ("s--", 0.0)}


def direction_layers(result: "Directions", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """By depth, cos(r_base, r_tuned) with its interval, dotted the cosine of two halves of one model's prompts; and d′
    of held-out prompts in either model along its own direction (with its interval) and the other's. Grey: random
    contrasts of the same prompts. A third panel where effects were measured: of taking the direction out and of adding
    it, own and other's, over all held-out prompts; bars are 95 % intervals, grey is random directions. The dotted
    vertical line is the depth whose directions were used. Returns the axes.
    """
    from matplotlib.ticker import MaxNLocator

    frame = result.to_frame()
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.5, columns=3 if result.has_effects else 2)
        entries = _cosines(axes[0], frame) | _separations(axes[1], frame)
        for ax in axes[:2]:
            ax.axvline(result.depth, color=NULL_LINE, lw=0.6, ls=":", zorder=0)
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.set_xlabel("after so many blocks" if result.data.attrs["site"] == "resid_post" else "layer")
        axes[0].set(ylabel="cos(r of base, r of tuned)", ylim=(min(-0.1, axes[0].get_ylim()[0]), 1.05))
        axes[1].set_ylabel("separation d′, held out")
        if result.has_effects:
            _effects(axes[2], result)
        legend(axes[0], entries, own=own, columns=4)
    return np.asarray(axes, dtype=object)


def _cosines(ax: "Axes", frame: Any) -> dict[str, Any]:
    depth = frame["depth"]
    ax.fill_between(depth, frame["null_low"], frame["null_high"], color=NULL_BAND, lw=0.8, zorder=0)
    shade = ax.fill_between(depth, frame["cosine_low"], frame["cosine_high"], color=BETWEEN, alpha=0.25, lw=0)
    (line,) = ax.plot(depth, frame["cosine"], "D-", color=BETWEEN, ms=2.5)
    entries = {"base with tuned": (shade, line)}
    for side, colour in COLOURS.items():
        (entries[f"halves of {side}"],) = ax.plot(depth, frame[f"halves_{side}"], ":", color=colour)
    return entries


def _separations(ax: "Axes", frame: Any) -> dict[str, Any]:
    low = np.fmin(*(frame[f"{side}_null_low"] for side in COLOURS))
    high = np.fmax(*(frame[f"{side}_null_high"] for side in COLOURS))
    entries: dict[str, Any] = {
        "random contrasts": ax.fill_between(frame["depth"], low, high, color=NULL_BAND, lw=0.8, zorder=0)
    }
    for side, colour in COLOURS.items():
        for source, (style, shade) in STYLES.items():
            name = f"{side}_{source}"
            if shade:
                ax.fill_between(
                    frame["depth"], frame[f"{name}_low"], frame[f"{name}_high"], color=colour, alpha=shade, lw=0
                )
            label = f"{side}, {'its own r' if source == 'own' else 'the other’s r'}"
            filled = colour if source == "own" else "white"
            (entries[label],) = ax.plot(frame["depth"], frame[name], style, color=colour, mfc=filled)
    ax.axhline(0, color="0.8", lw=0.6, zorder=-1)
    return entries


def _effects(ax: "Axes", result: "Directions") -> None:
    frame = result.effects()
    frame = frame[frame["class"] == "all"]
    names = {"ablate": "taken out", "add": "added"}
    ax.axhline(0, color="0.8", lw=0.6, zorder=-1)
    for group, kind in enumerate(names):
        for offset, (side, source) in enumerate((s, o) for s in COLOURS for o in STYLES):
            row = frame[(frame["intervention"] == kind) & (frame["side"] == side) & (frame["source"] == source)].iloc[0]
            x = group + (offset - 1.5) * 0.2
            bar = ax.bar(x, row["random_high"] - row["random_low"], 0.17, bottom=row["random_low"], color=NULL_BAND)
            bar.patches[0].set(edgecolor=NULL_BAND, lw=0.8, zorder=0)
            ax.vlines(x, row["low"], row["high"], color=COLOURS[side], lw=1)
            filled = COLOURS[side] if source == "own" else "white"
            ax.plot(x, row["effect"], STYLES[source][0][0], color=COLOURS[side], mfc=filled)
    ax.set_xticks(np.arange(len(names)), list(names.values()))
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel(f"effect on {LABELS[result.data.attrs['metric']]}")
    ax.set_title(f"r of depth {result.depth}")
