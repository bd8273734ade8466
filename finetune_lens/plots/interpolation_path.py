"""What happens on the straight line from the base to the tuned model, and beyond."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._cells import LABELS
from finetune_lens.plots._style import MARK, NULL_LINE, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.interpolation import Interpolation

COLOURS = (OBSERVED, MARK, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # one a file; they repeat


def interpolation_path(result: "Interpolation", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Accuracy and loss of θ0 + αΔ with 95 % bands, a colour a file; circle and square: base and tuned model.

    Dashed in the panel of the loss: the chord between the ends; a bar on it shows a barrier whose simultaneous interval
    is above 0.

    Raises:
        InputError: the path was not measured.
    """
    from matplotlib.ticker import MaxNLocator

    frame, barriers = result.path(), result.barrier().set_index(["file", "measure"])
    gain = result.gain().set_index(["file", "metric"])
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.4, columns=2)
        accuracy, loss = axes
        entries = {}
        for row, file in enumerate(result.files):
            colour = COLOURS[row % len(COLOURS)]
            for ax, metric, sign in ((accuracy, "accuracy", 1), (loss, "logprob", -1)):
                part = frame[(frame["file"] == file) & (frame["metric"] == metric)]
                band = ax.fill_between(
                    part["alpha"], sign * part["low"], sign * part["high"], color=colour, alpha=0.2, lw=0
                )
                (line,) = ax.plot(part["alpha"], sign * part["mean"], color=colour)
                entries[file] = (band, line)
                ends = sign * gain.loc[(file, metric), ["base", "tuned"]].to_numpy(dtype=float)
                for at, end, marker in zip((0, 1), ends, "os", strict=True):
                    ax.plot(at, end, marker, color=colour, mfc="white", ms=4, zorder=3)
                if metric == "logprob":
                    along = np.linspace(0, 1, 101)
                    ax.plot(along, (1 - along) * ends[0] + along * ends[1], color=colour, lw=0.7, ls=(0, (3, 2)))
                    found = barriers.loc[(file, "loss")]
                    if found["verdict"] == "barrier":
                        chord = (1 - found["alpha"]) * ends[0] + found["alpha"] * ends[1]
                        ax.vlines(found["alpha"], chord, chord + found["excess"], colors=colour, lw=2)
        for ax, label in ((accuracy, LABELS["accuracy"]), (loss, "loss (nats)")):
            for at in (0, 1):
                ax.axvline(at, color=NULL_LINE, lw=0.5, zorder=0)
            ax.set(xlabel="α (0: base, 1: tuned)", ylabel=label)
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 5, 10]))
            ax.margins(x=0.02)
        accuracy.set_ylim(-0.03, 1.03)
        legend(accuracy, entries, own=own, columns=4)
    return np.asarray(axes, dtype=object)
