"""Where the intruder dimensions are."""

from typing import TYPE_CHECKING

from finetune_lens.plots._map import Cells, draw_map
from finetune_lens.plots._style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.intruders import Intruders


def intruder_map(result: "Intruders", *, side: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Heat map of the number of intruder dimensions, component against layer, at the run's k and ε.

    Certain intruders only, summed over the matrices of a cell (experts, or names grouped as "other"). Cells without a
    matrix are hatched; "–" is the column of what lies outside the blocks.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    side = result.chosen_side(side)
    verdict = result.verdict().sel(side=side).isel(rank=slice(result.k))
    cells = Cells(result.data)
    counts = cells.total((verdict == 1).sum("rank").values)
    with styled():
        ax = draw_map(
            cells,
            counts,
            norm=Normalize(0, max(1, counts.max())),
            label="intruder dimensions",
            written=lambda count: f"{count:.0f}",
            bar={"ticks": MaxNLocator(5, integer=True)},
            ax=ax,
        )
        ax.set_title(f"top {result.k} {side} singular vectors, ε = {result.epsilon:g}")
    return ax
