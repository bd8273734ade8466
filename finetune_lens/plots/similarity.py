"""How the leading singular vectors of the tuned weights lie to those of the base."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, MARK, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from finetune_lens.results.intruders import Intruders

READABLE = 25  # ranks up to which single rows can be marked
LONGEST_TITLE = 44


def similarity(
    result: "Intruders",
    *,
    matrix: str | None = None,
    side: str | None = None,
    ranks: int | None = 10,
    ax: "Axes | None" = None,
) -> "Axes":
    """Heat map of |U0ᵀU1| for one matrix: tuned singular vectors (rows) against base ones (columns), σ descending.

    A row without a bright cell, over all base vectors and not only those shown, is an intruder; up to 25 ranks, the
    intruders among the run's top k are marked by a triangle.

    Args:
        matrix: its name; by default the one with the most intruders (of several, the one with the smallest cosine).
        ranks: leading vectors shown; None for all that the result keeps.

    Raises:
        InputError: no such matrix in the result.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    data = result.data.sel(side=result.chosen_side(side))
    verdict = result.verdict().sel(side=data.side).isel(rank=slice(result.k)).transpose("matrix", "rank")
    names = [str(n) for n in data.matrix.values]
    if matrix is not None and matrix not in names:
        raise InputError(f"no matrix {matrix!r} in this result; it has {', '.join(names[:5])} … ({len(names)} in all)")
    index = _most_intruders(data, verdict) if matrix is None else names.index(matrix)
    values = data.similarity.transpose("matrix", "similarity_rank", "similarity_base_rank").values[index]
    n = min(np.isfinite(values[:, 0]).sum(), values.shape[0] if ranks is None else ranks)
    values = values[:n, :n]
    edges = np.arange(n + 1) + 0.5
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN, height=2.8)
        mesh = ax.pcolormesh(edges, edges, values, vmin=0, vmax=1, cmap=mpl.colormaps[SEQUENTIAL], antialiased=False)
        ax.set(aspect="equal", xlim=edges[[0, -1]], ylim=edges[[-1, 0]])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(
                edges[:-1] + 0.5
                if n <= 10
                else [1, *(t for t in MaxNLocator(5, integer=True).tick_values(1, n) if 1 < t <= n)]
            )
        ax.set_xlabel("base singular vector i")
        ax.set_ylabel("tuned singular vector j")
        ax.spines[:].set_visible(False)
        if n <= READABLE:
            rows = np.flatnonzero(verdict.values[index] == 1) + 1
            rows = rows[rows <= n]
            ax.plot(
                np.full(len(rows), 1.03), rows, "<", color=MARK, ms=4, mew=0, clip_on=False,
                transform=ax.get_yaxis_transform(),
            )  # fmt: skip
        name = names[index]
        ax.set_title(name if len(name) <= LONGEST_TITLE else "…" + name[1 - LONGEST_TITLE :])
        letter = {"left": "u", "right": "v"}[str(data.side.values)]
        bar = ax.figure.colorbar(mesh, ax=ax, label=f"|cos({letter}$_j$, base {letter}$_i$)|", pad=0.06, aspect=25)
        bar.outline.set_visible(False)
    return ax


def _most_intruders(data: "xr.Dataset", verdict: "xr.DataArray") -> int:
    smallest = data.max_cos.isel(rank=slice(verdict.sizes["rank"])).min("rank").values
    return int(np.lexsort((smallest, -(verdict == 1).sum("rank").values))[0])
