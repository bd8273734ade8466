"""Do the parts that moved carry the behaviour?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import COMPONENTS, DIVERGING, OTHER, PAGE, grouped, new_axes, nothing, ordered, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.parts import Parts

SIZES = ("relative_norm", "delta_norm", "mask_density")
CARRIED = ("without", "alone", "patch_effect", "mask_density", "sensitivity", "intruders")
LABELLED = 40  # points from which only those farthest up and to the right have a label
FDR = 0.05


def parts(
    result: "Parts",
    *,
    level: str = "matrix",
    x: str | None = None,
    y: str | None = None,
    axes: "Sequence[Axes] | None" = None,
) -> np.ndarray:
    """Left: Spearman's ρ of every two columns; bold in a frame where it is beyond permuted rows (false discovery rate
    0.05 over the pairs). Right, of parts that moved: update size against what the part carries, coloured by component
    (heads: by layer) and labelled by layer, with 95 % intervals where there are. Returns the axes.

    Args:
        x, y: columns of the right panel; by default the size of the update (else mask density), and the loss without
            the part, else what it brings alone, the effect of patching it, its mask density.
    """
    from finetune_lens.results.parts import COLUMNS

    columns = result.columns(level)
    for name in (x, y):
        if name is not None and name not in columns:
            raise InputError(f"by {level} there is no {name!r}; there are {', '.join(columns)}")
    x = x or next((c for c in SIZES if c in columns), columns[0])
    y = y or next((c for c in CARRIED if c in columns and c != x), columns[-1])
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=max(2.5, 1.1 + 0.23 * len(columns)), columns=2)
        _matrix(axes[0], result, level, columns, COLUMNS)
        _scatter(axes[1], result, level, x, y, COLUMNS)
    return np.asarray(axes, dtype=object)


def _matrix(ax: "Axes", result: "Parts", level: str, columns: list[str], words: dict[str, str]) -> None:
    from matplotlib.patches import Rectangle

    at = result.data.sel(level=level, column=columns, other=columns)
    rho, p = at.rho.values, at.p_adjusted.values
    size = len(columns)
    shown = np.where(np.tril(np.ones((size, size), bool), -1), rho, np.nan)[1:, :-1]
    mesh = ax.imshow(np.ma.masked_invalid(shown), cmap=DIVERGING, vmin=-1, vmax=1, aspect="equal")
    for i in range(1, size):
        for j in range(i):
            if np.isnan(rho[i, j]):
                ax.text(j, i - 1, "–", ha="center", va="center", color="0.5", fontsize=6.5)
                continue
            clear = p[i, j] < FDR
            ax.text(
                j, i - 1, f"{rho[i, j]:.2f}".replace("-", "−"), ha="center", va="center", fontsize=6.5,
                weight="bold" if clear else "normal", color="white" if abs(rho[i, j]) > 0.6 else "black",
            )  # fmt: skip
            if clear:
                ax.add_patch(Rectangle((j - 0.46, i - 1.46), 0.92, 0.92, fill=False, ec="black", lw=0.9))
    names = [words[c] for c in columns]
    ax.set_xticks(np.arange(size - 1), names[:-1], rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(size - 1), names[1:])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"by {level}   (frame: beyond chance)")
    bar = ax.figure.colorbar(mesh, ax=ax, label="Spearman's ρ", pad=0.02, shrink=0.85, aspect=18)
    bar.outline.set_visible(False)


def _scatter(ax: "Axes", result: "Parts", level: str, x: str, y: str, words: dict[str, str]) -> None:
    table = result.table(level).dropna(subset=[x, y])
    if "delta_norm" in table:
        table = table[table["delta_norm"] != 0]  # as in ρ
    ax.axhline(0, color="0.75", lw=0.6, zorder=0)
    if table.empty or x == y:
        nothing(ax, "no part has two columns")
        return
    colours, entries = _colours(table, level)
    for end in ("_low", "_high"):
        if y + end in table:
            ax.vlines(table[x], table[y], table[y + end], colors=colours, lw=0.8, alpha=0.6, zorder=2)
    ax.scatter(table[x], table[y], c=colours, s=16, lw=0, zorder=3)
    far = np.argsort(-(table[x].rank(pct=True) + table[y].abs().rank(pct=True)).to_numpy())
    few = far if len(table) <= LABELLED else far[: LABELLED // 3]
    positive = table[x][table[x] > 0]
    if len(positive) == len(table) and positive.max() > 30 * positive.min():
        ax.set_xscale("log")
    ax.margins(0.08)
    ax.set(xlabel=_axis(result, x, words), ylabel=_axis(result, y, words))
    labels = table["head"] if level == "head" else table.get("layer", table[level])
    _label(ax, table[[x, y]].to_numpy()[few], ["out" if text == -1 else f"{text}" for text in labels.iloc[few]])
    row = result.data.sel(level=level, column=x, other=y)
    if not np.isnan(row.rho):
        ax.set_title(f"ρ = {float(row.rho):.2f}, p = {float(row.p_adjusted):.2g} adjusted".replace("-0", "−0"))
    if entries:
        ax.legend(entries.values(), entries, loc="upper left", bbox_to_anchor=(1.0, 1.02), handletextpad=0.1)


def _label(ax: "Axes", points: np.ndarray, texts: list[str]) -> None:
    """Texts at the points, the first ones first; none where it would stand on another."""
    ax.autoscale_view()
    scale = ax.figure.dpi / 72  # pixels a point of type
    placed: list[np.ndarray] = []
    for point, text in zip(points, texts, strict=True):
        at = ax.transData.transform(point) / scale
        if all((np.abs(at - other) > (3.5 * len(text) + 1, 6)).any() for other in placed):
            placed.append(at)
            ax.annotate(text, point, xytext=(3, 2), textcoords="offset points", fontsize=5.5, color="0.25")


def _axis(result: "Parts", name: str, words: dict[str, str]) -> str:
    metric = result.data.attrs.get(
        {"alone": "importance_metric", "without": "importance_metric", "patch_effect": "patch_metric"}.get(name, ""), ""
    )
    return words[name] + (f", {LABELS[metric]}" if metric else "")


def _colours(table: Any, level: str) -> tuple[list[Any], dict[str, Any]]:
    """Of each point, and for the legend."""
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    def dot(colour: Any) -> Any:
        return Line2D([], [], ls="none", marker="o", ms=4, mew=0, color=colour)

    if level in ("matrix", "component"):
        names = grouped(table["component"], own_names=0)
        colours = [COMPONENTS.get(n, COMPONENTS[OTHER]) for n in names]
        return colours, {n: dot(COMPONENTS.get(n, COMPONENTS[OTHER])) for n in ordered(names)}
    layers = table["layer"].to_numpy()
    known = np.unique(layers)
    places = np.linspace(0.1, 0.85, len(known))
    map_ = mpl.colormaps["viridis"]
    colours = [map_(places[np.searchsorted(known, layer)]) for layer in layers]
    few = known if len(known) <= 8 else known[np.linspace(0, len(known) - 1, 6).astype(int)]
    return colours, {f"layer {k}" if k >= 0 else "outside": dot(map_(places[np.searchsorted(known, k)])) for k in few}
