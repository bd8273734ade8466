"""At which depth do two models' representations part?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import MARK, NULL_BAND, OBSERVED, PAGE, legend, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.representations import Representations

LABELS = {
    "cka_debiased": "linear CKA", "rsa": "RSA (Spearman's ρ)", "procrustes": "Procrustes distance",
    "cosine": "cosine of rows", "change": "change / length in base", "size": "mean difference / length",
}  # fmt: skip
NULL = "0.6"
BIASED = "#56B4E9"


def representation_layers(result: "Representations", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Base with tuned model by depth, a panel a measure, with 95 % intervals over the texts (CKA: debiased; dotted, the
    biased one). Pale grey: the tuned model's rows shuffled. Dark grey: base with the null models. The last panel: the
    length of the mean difference tuned − base; pale grey, 95 % of random flips of signs. Returns the axes.

    Raises:
        InputError: models of different depth.
    """
    from matplotlib.ticker import MaxNLocator

    frame = result.layers()
    there = set(frame.loc[frame["value"].notna(), "measure"]) | ({"size"} if result.has_lens else set())
    names = [name for name in LABELS if name in there]
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.0 * -(-len(names) // 3), columns=3, rows=-(-len(names) // 3))
            for ax in np.ravel(axes)[len(names) :]:
                ax.axis("off")
        entries: dict[str, Any] = {}
        for ax, name in zip(np.ravel(axes), names, strict=False):
            if name == "size":
                entries |= _size(ax, result)
            else:
                entries |= _measure(ax, frame[frame["measure"] == name])
            if name == "cka_debiased":
                part = frame[frame["measure"] == "cka"]
                (entries["biased CKA"],) = ax.plot(part["depth"], part["value"], ":", color=BIASED)
            ax.set_ylabel(LABELS[name])
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            if not own or ax.get_subplotspec().is_last_row() or len(names) <= 3:
                ax.set_xlabel("after so many blocks" if result.data.attrs["site"] == "resid_post" else "layer")
        legend(np.ravel(axes)[0], entries, own=own, columns=5)
    return np.asarray(axes, dtype=object)


def _measure(ax: "Axes", part: Any) -> dict[str, Any]:
    depth = part["depth"].to_numpy()
    found = {}
    found["rows shuffled"] = ax.fill_between(
        depth, part["shuffled_low"], part["shuffled_high"], color=NULL_BAND, lw=0.8, zorder=0
    )
    if "null_low" in part:
        found["null models"] = ax.fill_between(depth, part["null_low"], part["null_high"], color=NULL, lw=0.8, zorder=1)
    shade = ax.fill_between(depth, part["low"], part["high"], color=OBSERVED, alpha=0.25, lw=0, zorder=2)
    (line,) = ax.plot(depth, part["value"], "o-", color=OBSERVED, zorder=3)
    return {"base with tuned": (shade, line)} | found


def _size(ax: "Axes", result: "Representations") -> dict[str, Any]:
    sizes = result.sizes()
    ax.fill_between(sizes["depth"], 0, sizes["chance"], color=NULL_BAND, lw=0.8, zorder=0)
    (line,) = ax.plot(sizes["depth"], sizes["size"], "s-", color=MARK, zorder=3)
    ax.set_ylim(bottom=0)
    return {"mean difference": line}
