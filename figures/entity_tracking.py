"""The circuit of the base, how faithful it is in both models, what its heads give before and after, what they carry.

    python -m figures.entity_tracking

Reads analyses/results; writes figures/entity_tracking.png and .pdf.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analyses import entity_tracking as study
from finetune_lens import plots
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY, CLAIMS = "python -m analyses.entity_tracking", "entity_tracking.md"
GALLERY = {
    "entity_tracking": (
        "Does the same circuit serve both models?",
        "The circuit that tracks entities in the base, how faithful it is before and after tuning, and what "
        "its heads carry.",
    ),
}
ARM = "control"


def draw(results: Mapping[str, Any], circuits: Mapping[str, Any]) -> "Figure":
    """Above the circuit; then faithfulness beside the direct effects of heads; below what the groups carry (DCM)."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    with _style.styled():
        figure = plt.figure(figsize=(_style.PAGE, 7.4), FigureClass=StyledFigure)
        grid = figure.add_gridspec(3, 2, height_ratios=(1.0, 1.3, 1.0))
        whole, left, right, below = (
            figure.add_subplot(grid[at]) for at in ((0, slice(0, 2)), (1, 0), (1, 1), (2, slice(0, 2)))
        )
        plots.circuit_diagram(circuits["base"], ax=whole)
        plots.circuit_faithfulness(results[f"{ARM}-evaluation"], ax=left)
        plots.head_effects(results[f"{ARM}-heads"], axes=[right])
        plots.dcm_accuracy(results["base-dcm"], ax=below)
        for ax, columns, lower in ((left, 2, -0.17), (right, 1, -0.17)):
            _below(ax, columns, lower)
    return figure


def _below(ax: "Axes", columns: int, lower: float) -> None:
    """The legend under its axes."""
    legend = ax.get_legend()
    legend.set_loc("upper center")
    legend.set_ncols(columns)
    legend.set_bbox_to_anchor((0.5, lower), transform=ax.transAxes)


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    return {"entity_tracking": draw(study.stored(), study.circuits())}


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
