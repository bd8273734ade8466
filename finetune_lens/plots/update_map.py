"""Where the update is large."""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._map import Cells, draw_map
from finetune_lens.plots._style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.updates import Updates

WIDE = 30  # largest over smallest value from which the colours are logarithmic


def update_map(result: "Updates", *, ax: "Axes | None" = None) -> "Axes":
    """Heat map of ‖Δ‖_F/‖W0‖_F, component against layer; over several weights of a cell, of their joint norm.

    Unchanged cells read 0, cells without a weight are hatched, an update of a zero base reads ∞. Colours are
    logarithmic when the values span more than a factor of 30.
    """
    from matplotlib.colors import LogNorm, Normalize

    data, cells = result.data, Cells(result.data)
    delta, base = (np.sqrt(cells.total(data[name].values ** 2)) for name in ("delta_norm", "base_norm"))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(delta.data == 0, 0.0, delta.data / base.data)
    relative = np.ma.masked_array(ratio, np.ma.getmaskarray(delta))
    shown = relative.compressed()
    shown = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    norm = LogNorm(low, high) if len(shown) and high > WIDE * low else Normalize(0, high)
    with styled():
        return draw_map(
            cells,
            relative,
            norm=norm,
            label="‖Δ‖ / ‖W0‖",
            written=lambda value: "∞" if np.isinf(value) else f"{value:.2g}",
            bar={},
            ax=ax,
        )
