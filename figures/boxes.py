"""Where the gain on boxes lives: heads patched across models, each arm tuned from the same base.

    python -m figures.boxes

Reads analyses/results; writes figures/boxes.png and .pdf.
"""

from typing import TYPE_CHECKING

from analyses import boxes as study
from finetune_lens import plots
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune_lens.results.cmap import CrossPatching

STUDY, CLAIMS = "python -m analyses.boxes", "boxes.md"
GALLERY = {
    "boxes": (
        "Where the gain lives",
        "Single heads patched across models: two arms tuned on another task, and one tuned on boxes.",
    ),
}


def draw(results: dict[str, "CrossPatching"]) -> "Figure":
    """A row an arm, a column a direction: mean effect by layer and head."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    with _style.styled():
        figure, axes = plt.subplots(
            len(results), 2, figsize=(_style.PAGE, 1.5 * len(results)), FigureClass=StyledFigure, squeeze=False
        )
        for row, (arm, result) in zip(axes, results.items(), strict=True):
            for ax, direction in zip(row, result.directions, strict=True):
                plots.patching_heatmap(result, direction=direction, quantity="effect", ax=ax)
                ax.set_title(f"{arm}: {direction}")
    return figure


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    return {"boxes": draw({arm: study.stored(arm) for arm in study.ARMS})}


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
