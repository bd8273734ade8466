"""Which depth of one model is like which of the other?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.representations import Representations

LABELS = {"cka_debiased": "linear CKA, debiased", "cka": "linear CKA, biased"}


def cka_matrix(result: "Representations", *, measure: str = "cka_debiased", ax: "Axes | None" = None) -> "Axes":
    """CKA of every depth of the base (rows, from below) with every depth of the tuned model (columns); the colours end
    at 1 and at 0, or at the least value where that is below. A ring: for each depth of the tuned model the depth of
    the base it is most like.

    Raises:
        InputError: neither of the two kinds of CKA.
    """
    from matplotlib.ticker import MaxNLocator

    if measure not in LABELS:
        raise InputError(f"measure is one of {', '.join(LABELS)}; found {measure!r}")
    values = result.data[measure].transpose("base_depth", "tuned_depth").values
    rows, columns = values.shape
    with styled():
        if ax is None:
            (ax,) = new_axes(width=COLUMN, height=min(7.0, 0.5 + 0.78 * COLUMN * rows / columns))
        low = min(0.0, float(np.nanmin(values))) if np.isfinite(values).any() else 0.0
        image = ax.imshow(values, origin="lower", vmin=low, vmax=1, cmap=SEQUENTIAL, aspect="equal")
        best = [(int(np.nanargmax(c)), j) for j, c in enumerate(values.T) if np.isfinite(c).any()]
        for dark, colour in ((True, "white"), (False, "black")):
            some = [(i, j) for i, j in best if (values[i, j] > low + 0.55 * (1 - low)) == dark]
            ax.plot([j for _, j in some], [i for i, _ in some], "o", ms=2.5, mfc="none", mec=colour, mew=0.7)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        unit = "after so many blocks" if result.data.attrs["site"] == "resid_post" else "layer"
        ax.set(xlabel=f"tuned model, {unit}", ylabel=f"base, {unit}")
        ax.set_title("ring: the base's depth most alike")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = ax.figure.colorbar(image, ax=ax, label=LABELS[measure], pad=0.02, aspect=20, shrink=0.9)
        bar.outline.set_visible(False)
    return ax
