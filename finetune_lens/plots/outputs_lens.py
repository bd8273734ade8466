"""At which depth the two models' predictions part."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import MARK, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.outputs import Outputs

SIDES = {"base": (OBSERVED, "o-"), "tuned": (MARK, "s-")}


def outputs_lens(result: "Outputs", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Logit lens by depth (0: the embedding): loss of both sides on the text, or log-probability of the answers where
    there are any; agreement with their own final prediction; KL(base ‖ tuned). Means and 95 % intervals over texts.

    Raises:
        InputError: compared without the lens.
    """
    from matplotlib.ticker import MaxNLocator

    frame = result.lens()
    first = ("answer", "log-probability of answer")
    if not frame["answer"].notna().any():
        first = ("loss", "loss on the text (nats)")
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.3, columns=3)
        entries = {}
        for ax, (name, label) in zip(axes, (first, ("agreement", "share equal to final top")), strict=False):
            for side, (colour, marker) in SIDES.items():
                part = frame[frame["side"] == side]
                shade = ax.fill_between(
                    part["depth"], part[f"{name}_low"], part[f"{name}_high"], color=colour, alpha=0.2, lw=0
                )
                (line,) = ax.plot(part["depth"], part[name], marker, color=colour)
                entries[side] = (shade, line)
            ax.set(xlabel="after so many blocks", ylabel=label)
        part = frame[frame["side"] == "base"]
        axes[2].fill_between(part["depth"], part["kl_low"], part["kl_high"], color="0.4", alpha=0.2, lw=0)
        axes[2].plot(part["depth"], part["kl"], "o-", color="0.2")
        axes[2].set(xlabel="after so many blocks", ylabel="KL(base ‖ tuned), nats")
        axes[2].set_ylim(bottom=0)
        for ax in axes:
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        legend(axes[0], entries, own=own, columns=2)
    return np.asarray(axes, dtype=object)
