"""Where a skill lives: grafts of the family `skills`, and all that moves part of an update on one axis.

    python -m figures.skill_localization

Reads analyses/results; writes figures/skill_localization.png and .pdf (a panel a pair), figures/recovery_axis.png and
.pdf, and figures/parts.png and .pdf (one pair).
"""

from typing import TYPE_CHECKING

import finetune_lens as fl
from analyses import skill_localization as study
from finetune_lens import plots
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune_lens.results.grafting import Grafting

STUDY, CLAIMS = "python -m analyses.skill_localization", "skill_localization.md"
GALLERY = {
    "skill_localization": (
        "Where does a skill live?",
        "Share of the entries of an update that recover its gain, for a new and a selected skill, by "
        "how they were tuned.",
    ),
    "recovery_axis": (
        "One axis for all of it",
        "Everything that moves part of an update or of a run: share moved against share of the gain recovered.",
    ),
    "parts": (
        "The same parts by every measure",
        "Size of the update, intruders, graft, sensitivity and patch effect of each matrix, and how their ranks agree.",
    ),
}
SHOWN = study.JOINED[0]
CURVES = (
    "graft", "largest |Δ|", "largest |g⊙Δ|", "random", "ternary top-|τ|", "layers swapped from below",
    "layers swapped from above", "interpolation", "intruders alone", "all but intruders",
)  # fmt: skip


def draw(results: dict[str, "Grafting"]) -> "Figure":
    """A row a skill, a column a way of tuning: recovery on test prompts against the share of entries."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    from finetune_lens.plots._figure import StyledFigure
    from finetune_lens.plots.graft_recovery import METHODS

    with _style.styled():
        figure, axes = plt.subplots(
            2, 3, figsize=(_style.PAGE, 4.5), FigureClass=StyledFigure, sharex=True, sharey=True, squeeze=False
        )
        for ax, (arm, result) in zip(axes.ravel(), results.items(), strict=True):
            plots.graft_recovery(result, file="test", ax=ax)
            ax.set_title(f"{study.ARMS[arm]}\nconcentration of Δ: {result.concentration:.2f}")
            ax.get_legend().remove()
            search = result.along_search()
            search = search[search["level"] == search["level"].min()].sort_values("share")
            ax.plot(search["share"], search["recovery"], color=_style.OBSERVED, lw=0.8, ls=":", zorder=1)
        axes[0, 0].set_xlim(1e-3, 1.0)
        for ax in axes.ravel():
            ax.label_outer()
        entries = {name: Line2D([], [], color=c, marker=m, ms=3.5, mew=0) for name, (c, m) in METHODS.items()}
        entries |= {"all of the blocks": Line2D([], [], color="black", marker="*", ls="", mew=0, ms=5.5)}
        entries |= {"along one search, on its own examples": Line2D([], [], color=_style.OBSERVED, lw=0.8, ls=":")}
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    return figure


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    import numpy as np

    recovery, parts = (fl.load(study.RESULTS / f"skills-{SHOWN}-{name}.nc") for name in ("recovery", "parts"))
    return {
        "skill_localization": draw({arm: study.stored(arm) for arm in study.ARMS}),
        "recovery_axis": np.ravel(plots.recovery_axis(recovery, curves=CURVES))[0].figure,
        "parts": np.ravel(plots.parts(parts))[0].figure,
    }


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
