"""How alike are the updates of several models of one base?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._map import CELL_TYPE
from finetune_lens.plots._style import DIVERGING, NULL_LINE, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.task_vectors import TaskVectors

FDR = 0.05  # a cell is told from chance where its adjusted p-value is below
LONGEST_NAME = 18
ROOM = 22  # letters that fit under a panel; with longer names, columns have numbers
PANEL = 1.45  # inches, about


def task_vectors(
    result: "TaskVectors", *, tau: float | None = None, axes: "Sequence[Axes] | None" = None
) -> "np.ndarray[Axes]":
    """Heat maps, model against model: cosine, sign conflict less that of chance, Jaccard index of the largest entries.

    Cells that chance explains (adjusted p ≥ 0.05) are hatched; the diagonal is grey, and so is a pair of which nothing
    can be said. What chance gives the overlap stands in the title and as a line in the colour bar. Returns the axes.

    Args:
        tau: of the overlap, one of the result's; by default the middle one.
    """
    found, n = result.total, len(result.models)
    at = found.sel(tau=result.tau if tau is None else tau)
    off = ~np.eye(n, dtype=bool)
    surplus = found.sign_conflict - found.sign_conflict_null
    chance = at.jaccard_null.values[off]
    chance = chance[np.isfinite(chance)]
    stated, mean = "", 0.0
    if len(chance):
        low, mean, high = chance.min(), chance.mean(), chance.max()
        stated = f"chance {mean:.2g}" if high <= 1.1 * low else f"chance {low:.2g} to {high:.2g}"
    most = max(np.nanmax(at.jaccard.values[off], initial=0), 3 * np.max(chance, initial=0), 1e-3)
    conflict = np.nanmax(np.abs(surplus.values[off]), initial=0.05)
    panels: list[dict[str, Any]] = [
        {"values": found.cosine, "p": found.cosine_p_adjusted, "limits": (-1, 1), "title": "cosine of the updates\n"},
        {"values": surplus, "p": found.sign_conflict_p_adjusted, "limits": (-conflict, conflict),
         "title": "sign conflict − chance\n"},
        {"values": at.jaccard, "p": at.jaccard_p_adjusted, "limits": (0, most), "line": mean,
         "title": f"overlap (Jaccard), largest {100 * float(at.tau):g} %\n{stated}"},
    ]  # fmt: skip
    if any((np.asarray(panel["p"])[off] >= FDR).any() for panel in panels):
        panels[0]["title"] += "hatched: as by chance"
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=2.2, columns=3)
        for ax, panel in zip(axes, panels, strict=True):
            _map(ax, off, **panel)
        names = [name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :] for name in result.models]
        numbered = max(map(len, names)) * n > ROOM
        numbers = [str(i) for i in range(1, n + 1)]
        rows = [f"{name}  {i}" for name, i in zip(names, numbers, strict=True)] if numbered else names
        for ax in axes:
            ax.set_xticks(np.arange(n), numbers if numbered else names)
            ax.set_yticks(np.arange(n), rows if ax is axes[0] else numbers if numbered else [])
    return np.asarray(axes, dtype=object)


def _map(
    ax: "Axes", off: np.ndarray, *, values: Any, p: Any, limits: tuple[float, float], title: str, line: float = 0.0
) -> None:
    """One panel with its colour bar, in which `line` is marked."""
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    n = len(off)
    shown = np.ma.masked_invalid(np.where(off, values, np.nan))
    ax.set_facecolor("0.92")
    cmap = mpl.colormaps[DIVERGING if limits[0] else SEQUENTIAL]
    mesh = ax.imshow(shown, vmin=limits[0], vmax=limits[1], cmap=cmap)
    decimals = 2 if limits[1] >= 0.1 else 3
    texts = {(i, j): _short(shown[i, j], decimals) for i, j in np.argwhere(~np.ma.getmaskarray(shown))}
    readable = 72 * PANEL / n >= 0.62 * CELL_TYPE * max(map(len, texts.values()), default=0)
    for (i, j), text in texts.items():
        light = np.dot(mesh.to_rgba(shown[i, j])[:3], (0.299, 0.587, 0.114)) > 0.5
        behind = {}
        if np.asarray(p)[i, j] >= FDR:
            behind = {"bbox": {"facecolor": mesh.to_rgba(shown[i, j]), "edgecolor": "none", "pad": 0.8}}
            corner = (j - 0.5, i - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor="0.6", hatch="//////", lw=0, zorder=2))
        if readable:
            ink = "black" if light else "white"
            ax.text(j, i, text, ha="center", va="center", fontsize=CELL_TYPE, color=ink, zorder=3, **behind)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(np.arange(n + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    bar = ax.figure.colorbar(mesh, cax=ax.inset_axes([1.05, 0, 0.06, 1]))
    bar.outline.set_visible(False)
    if line:
        bar.ax.axhline(line, color=NULL_LINE, lw=1.2)


def _short(value: float, decimals: int) -> str:
    """`.23`, `−.07`, `1.0`."""
    text = f"{round(float(value), decimals) + 0.0:.{decimals}f}".replace("-", "−")  # + 0.0: no −0
    return text.replace("0.", ".", 1) if text.lstrip("−").startswith("0") else text[:-1]
