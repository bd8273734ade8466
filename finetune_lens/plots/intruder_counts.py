"""How the number of intruder dimensions depends on ε and on k, beside what chance gives."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import NULL_BAND, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled
from finetune_lens.results.intruders import resampled_totals

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from finetune_lens.results.intruders import Intruders

EPSILONS = np.linspace(0.01, 0.95, 95)  # towards 1 every vector counts
WITHOUT_NULL = 50  # vectors shown when no null says how many
DASHED = {"color": "0.6", "lw": 0.8, "ls": (0, (3, 2))}


def intruder_counts(
    result: "Intruders", *, side: str | None = None, axes: "Sequence[Axes] | None" = None
) -> "np.ndarray":
    """Intruder dimensions over all matrices, against ε at the run's k (left) and against k at the run's ε (right).

    Line: certain intruders; the shade above it adds the undetermined. Grey: mean and 95 % interval of the count that
    random directions with the update's own singular values give; dashed: the mean when its energy is spread evenly.
    The null ends where it was not drawn; the dashed line may leave the panel. Dots mark the run's ε
    and k. Returns the two axes.
    """
    side = result.chosen_side(side)
    data = result.data.sel(side=side)
    reach = data.sizes.get("null_rank", 0)
    ks = np.arange(1, min(data.sizes["rank"], 2 * max(reach or WITHOUT_NULL, result.k)) + 1)
    by_epsilon = result.grid(EPSILONS, [result.k], side=side).values[:, 0]
    by_k = result.grid([result.epsilon], ks, side=side).values[0]
    possible_by_epsilon = _possible(data, EPSILONS)[:, : result.k].sum(1)
    possible_by_k = _possible(data, [result.epsilon])[0].cumsum()[: len(ks)]
    with styled():
        own = axes is None
        axes = new_axes(width=PAGE, height=2.5, columns=2) if own else np.asarray(axes, dtype=object)
        entries = _draw(axes[0], EPSILONS, by_epsilon, possible_by_epsilon)
        entries |= _draw(axes[1], ks, by_k, possible_by_k)
        seen = {axes[0]: possible_by_epsilon.max(), axes[1]: possible_by_k.max()}
        if reach:
            for ax, x, spectrum, evenly in _nulls(data, result.epsilon, result.k, ks[:reach], axes):
                mean, low, high = band(spectrum)
                shade = ax.fill_between(x, low, high, color=NULL_BAND, lw=0, zorder=0)
                (line,) = ax.plot(x, mean, color=NULL_LINE, lw=0.8, zorder=1)
                entries["chance, the update's own spectrum (95 %)"] = (shade, line)
                seen[ax] = max(seen[ax], high.max())
                (entries["chance, energy spread evenly"],) = ax.plot(x, evenly.mean(0).sum(0), zorder=1, **DASHED)
        for ax, x in zip(axes, (result.epsilon, min(result.k, ks[-1])), strict=True):
            ax.axvline(x, color="0.3", lw=0.5, ls=":", zorder=0)
            ax.plot([x], [result.count(side=side)], "o", color=OBSERVED, zorder=4, clip_on=False)
            ax.set_ylim(0, 1.1 * max(1, seen[ax]))
            ax.yaxis.get_major_locator().set_params(integer=True)
        axes[0].set(xlabel=f"threshold ε  (k = {result.k})", ylabel=f"intruder dimensions ({side})", xlim=(0, 1))
        axes[1].set(xlabel=f"leading vectors k  (ε = {result.epsilon:g})", xlim=(0, ks[-1] + 0.5))
        legend(axes[0], entries, own=own, columns=len(entries))
    return axes


def band(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95 % interval of the total at every point (`Intruders.null`), from counts (draw, matrix, point)."""
    low, high = np.quantile(resampled_totals(counts), [0.025, 0.975], axis=0)
    return counts.mean(0).sum(0), low, high


def _draw(ax: "Axes", x: np.ndarray, certain: np.ndarray, possible: np.ndarray) -> dict[str, Any]:
    """The observed counts; label → handle."""
    (line,) = ax.plot(x, certain, color=OBSERVED, zorder=3)
    if (possible == certain).all():
        return {"observed": line}
    shade = ax.fill_between(x, certain, possible, color=OBSERVED, alpha=0.3, lw=0, zorder=2)
    return {"observed": line, "with the undetermined": shade}


def _possible(data: "xr.Dataset", epsilons: Iterable[float]) -> np.ndarray:
    """Vectors of each rank that are intruders or undetermined: (epsilon, rank)."""
    exists, lower = (v.transpose("matrix", "rank").values for v in (data.max_cos.notnull(), data.lower))
    return np.stack([(exists & ~(lower >= e)).sum(0) for e in epsilons])


def _nulls(
    data: "xr.Dataset", epsilon: float, k: int, ks: np.ndarray, axes: "Sequence[Axes]"
) -> "list[tuple[Axes, np.ndarray, np.ndarray, np.ndarray]]":
    """Per panel: axes, x, counts (draw, matrix, x) under the two nulls, as far as they were drawn."""
    cosines = data.null_max_cos.transpose("null", "draw", "matrix", "null_rank")
    spectrum, evenly = (cosines.sel(null=name).values for name in ("spectrum", "evenly"))
    panels = []
    if k <= data.attrs.get("null_ranks", cosines.sizes["null_rank"]):
        counts = (np.stack([(v[..., :k] < e).sum(-1) for e in EPSILONS], -1) for v in (spectrum, evenly))
        panels.append((axes[0], EPSILONS, *counts))
    counts = (np.cumsum(v < epsilon, axis=-1)[..., : len(ks)] for v in (spectrum, evenly))
    return [*panels, (axes[1], ks, *counts)]
