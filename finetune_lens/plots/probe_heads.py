"""From which heads a label can be read out, and where tuning changed that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import DIVERGING, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.probing import Probing

FDR = 0.05
ROW = 0.14  # inches a layer needs


def probe_heads(result: "Probing", *, axes: "Sequence[Axes] | None" = None) -> np.ndarray:
    """Layer × head: score of the base's own probes, of the tuned model's, and tuned − base.

    A dot: clear of the majority (of the difference: of 0) at a false discovery rate of 5 % over the heads.

    Raises:
        InputError: heads are not probed apart; draw `probe_layers`.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    if "head" not in result.places:
        raise InputError("heads are not probed apart in this result; draw probe_layers")
    frame = result.to_frame()
    differences = result.differences()
    panels = [(frame[frame["side"] == side], "score", "gain", side) for side in ("base", "tuned")]
    panels.append((differences, "difference", "difference", "tuned − base"))
    floor = result.majority()[0]
    most = np.nanmax(np.abs(differences["difference"])) or 1.0
    norms = [Normalize(floor, max(frame["score"].max(), floor + 1e-6))] * 2 + [Normalize(-most, most)]
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=min(8.0, max(1.9, 1.0 + ROW * frame["layer"].nunique())), columns=3)
        for number, (ax, (part, name, clear, title), norm) in enumerate(zip(axes, panels, norms, strict=True)):
            values = part.pivot(index="layer", columns="head", values=name)
            mesh = ax.pcolormesh(
                values.columns, values.index, values.to_numpy(), norm=norm, shading="nearest",
                cmap=DIVERGING if number == 2 else SEQUENTIAL, edgecolors="white", linewidth=0.2,
            )  # fmt: skip
            sure = part[(part["p"] <= FDR) & ((part[clear] > 0) | (number == 2))]
            far = norm(sure[name]) if number < 2 else np.abs(sure[name]) / most
            for dark, colour in ((False, "black"), (True, "white")):
                some = sure[(np.asarray(far) > 0.6) == dark]
                ax.plot(some["head"], some["layer"], ".", color=colour, ms=2.5, mew=0)
            ax.set(title=title, xlabel="head")
            ax.invert_yaxis()
            for direction in (ax.xaxis, ax.yaxis):
                direction.set_major_locator(MaxNLocator(12, integer=True))
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            label = result.measure if number < 2 else "difference"
            ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, aspect=15).outline.set_visible(False)
        axes[0].set_ylabel("layer")
    return np.asarray(axes, dtype=object)
