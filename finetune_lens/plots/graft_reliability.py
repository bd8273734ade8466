"""Does a graft know what it knows?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, MARK, NULL_LINE, OBSERVED, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.grafting import Grafting

MODELS = {"base": (NULL_LINE, "v-"), "tuned": (MARK, "s-"), "graft": (OBSERVED, "o-")}


def graft_reliability(
    result: "Grafting", *, file: str | None = None, level: float | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Accuracy against confidence in bins of equal width, of base, tuned model and graft: 95 % Wilson intervals of each
    bin, the expected calibration error in the legend. Bars: the share of examples in each bin, on the same axis.

    Args:
        file: on whose examples; by default the first that was held out.
        level: sparsity of the base mask of the graft, by default the last.

    Raises:
        InputError: texts, which have no confidence in an answer.
    """
    file = file or result.held_out
    curves = {m: result.calibration(file=file, method=m, level=level) for m in MODELS}
    if np.isnan(curves["tuned"][1]):
        raise InputError("reliability needs answers that are right or wrong; this result is of texts")
    with styled():
        own = ax is None
        if own:
            (ax,) = new_axes(width=COLUMN, height=2.9)
        ax.plot([0, 1], [0, 1], color="0.7", lw=0.7, zorder=1)
        entries = {}
        for number, (method, (colour, marker)) in enumerate(MODELS.items()):
            curve, error = curves[method]
            bins, examples = len(curve), curve["examples"].to_numpy()
            edges = np.arange(bins) / bins
            width = 0.9 / (len(MODELS) * bins)
            left = edges + 0.05 / bins + number * width
            bars = ax.bar(left, examples / examples.sum(), width, align="edge", color=colour, alpha=0.3, lw=0, zorder=0)
            curve = curve[examples > 0]
            low, high = _wilson(curve["accuracy"].to_numpy(), curve["examples"].to_numpy())
            ax.vlines(curve["confidence"], low, high, color=colour, lw=0.8, alpha=0.5, zorder=2, clip_on=False)
            (line,) = ax.plot(
                curve["confidence"],
                curve["accuracy"],
                marker,
                color=colour,
                mew=0,
                lw=0.8,
                zorder=3 + number,
                clip_on=False,
            )
            entries[f"{method}, ECE {error:.3f}"] = (bars, line)
        ax.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy; bars: share of examples",
            title=f"measured on {file}",
        )  # fmt: skip
        legend(ax, entries, own=own, columns=2)
    return ax


def _wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share of n."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return centre - half, centre + half
