"""Which heads look elsewhere after tuning?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, DIVERGING, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.attention import Attention

LABELS = {
    "divergence": "JS divergence (nats)", "entropy": "entropy (nats),\ntuned − base",
    "first": "attention on first token,\ntuned − base",
}  # fmt: skip
FDR = 0.05
NARROW = 16  # heads that fit into a column


def attention_heads(result: "Attention", *, quantity: str = "divergence", ax: "Axes | None" = None) -> "Axes":
    """A cell a head: divergence of its attention in the two models; or the shift of its entropy, or of its attention on
    the first token (dot: clear of 0 at a false discovery rate of 5 %).

    Raises:
        InputError: another quantity.
    """
    from matplotlib.ticker import MaxNLocator

    if quantity not in LABELS:
        raise InputError(f"quantity is one of {', '.join(LABELS)}; found {quantity!r}")
    signed = quantity != "divergence"
    frame = result.to_frame()
    rows, columns = (result.data[dim].values for dim in ("layer", "head"))
    shape = len(rows), len(columns)
    values = frame[f"{quantity}_difference" if signed else quantity].to_numpy().reshape(shape)
    most = np.nanmax(np.abs(values), initial=0) or 1.0
    with styled():
        if ax is None:
            width = COLUMN if shape[1] <= NARROW else PAGE
            (ax,) = new_axes(width=width, height=float(np.clip(0.75 + 0.17 * shape[0], 1.6, 7.5)))
        mesh = ax.pcolormesh(
            np.arange(shape[1] + 1) - 0.5, np.arange(shape[0] + 1) - 0.5, values, vmin=-most if signed else 0,
            vmax=most, cmap=DIVERGING if signed else SEQUENTIAL, edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        if signed:
            clear = (frame[f"{quantity}_p_adjusted"] < FDR).to_numpy().reshape(shape)
            y, x = np.nonzero(clear)
            dark = np.abs(values[y, x]) > 0.6 * most
            ax.scatter(x, y, s=2.5, c=np.where(dark, "white", "black"), lw=0)
        for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
            if len(names) <= 16:
                axis.set_ticks(np.arange(len(names)), [str(name) for name in names])
            else:
                axis.set_major_locator(MaxNLocator(12, integer=True))
        ax.set(xlabel="head", ylabel="layer", xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = ax.figure.colorbar(mesh, ax=ax, label=LABELS[quantity], pad=0.02, aspect=15)
        bar.outline.set_visible(False)
    return ax
